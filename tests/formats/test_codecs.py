import math
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from dsr_tool.errors import FormatError
from dsr_tool.formats.codecs import CODECS, encode_smallest
from dsr_tool.sparsity.layers import matrix_shape
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor

SHAPES = [(1,), (7,), (3, 5), (64, 33), (4, 3, 3, 3), (1, 2000), (0, 4), (2, 1, 1)]


def make(shape, density, seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    mask = Mask.from_bool(rng.random(shape) < density)
    values = rng.normal(size=mask.active).astype(dtype)
    values[rng.random(mask.active) < 0.1] = -0.0
    return SparseTensor(mask, values)


EVERY_MASK = [name for name, codec in CODECS.items() if codec.fits(make((3, 5), 0.4, 1))]
"""Codecs that take any mask; `test_groups.py` is about the others."""


def bits(array):
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


@pytest.mark.parametrize("name", EVERY_MASK)
@given(
    shape=st.sampled_from(SHAPES),
    density=st.sampled_from([0.0, 0.002, 0.1, 0.5, 0.51, 0.9, 1.0]),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([np.float32, np.float16, np.float64]),
)
def test_decode_is_the_exact_inverse_of_encode(name, shape, density, seed, dtype):
    tensor = make(shape, density, seed, dtype)
    decoded = CODECS[name].decode(CODECS[name].encode(tensor), shape, tensor.mask.active, np.dtype(dtype))
    np.testing.assert_array_equal(decoded.mask.positions, tensor.mask.positions)
    np.testing.assert_array_equal(bits(decoded.values), bits(tensor.values))
    np.testing.assert_array_equal(bits(decoded.to_dense()), bits(tensor.to_dense()))


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf, -0.0, 1e-45])
@pytest.mark.parametrize("name", EVERY_MASK)
def test_special_values_keep_their_bits(name, special):
    tensor = SparseTensor(
        Mask.from_bool(np.array([[True, False], [True, True]])), np.array([1, special, 2], np.float32)
    )
    decoded = CODECS[name].decode(CODECS[name].encode(tensor), (2, 2), 3, np.dtype(np.float32))
    np.testing.assert_array_equal(bits(decoded.values), bits(tensor.values))


def test_csr_streams_are_the_matrix_view_for_scipy():
    tensor = make((16, 8, 3, 3), 0.2, 1)
    streams = CODECS["csr"].encode(tensor)
    expected = scipy.sparse.csr_matrix(tensor.to_dense().reshape(matrix_shape(tensor.mask.shape)))
    expected.data[expected.data == 0] = 0
    ours = scipy.sparse.csr_matrix(
        (streams["values"], streams["indices"], streams["indptr"]), shape=matrix_shape(tensor.mask.shape)
    )
    ours.check_format(full_check=True)
    np.testing.assert_array_equal(ours.toarray(), expected.toarray())


@pytest.mark.parametrize("density", [0.02, 0.05, 0.1, 0.2])
def test_delta_masks_come_within_two_per_cent_of_the_entropy_bound(density):
    tensor = make((512, 2304), density, 0)
    coded = CODECS["delta"].encode(tensor)["mask"].nbytes * 8
    assert coded <= 1.02 * tensor.mask.entropy_bound_bits


@pytest.mark.parametrize("name", EVERY_MASK)
@given(
    shape=st.sampled_from(SHAPES),
    density=st.sampled_from([0.0, 0.1, 1.0]),
    dtype=st.sampled_from([np.float16, np.float32]),
)
def test_a_codec_states_the_exact_size_of_its_streams(name, shape, density, dtype):
    tensor = make(shape, density, 0, dtype)
    assert CODECS[name].nbytes(tensor) == sum(array.nbytes for array in CODECS[name].encode(tensor).values())


def test_the_document_says_what_each_codec_is_good_for():
    document = Path("docs/format.md").read_text(encoding="utf-8")
    for codec in CODECS.values():
        assert f"| **{codec.name}** | {codec.good_for} |" in document


@given(
    shape=st.sampled_from([(64, 64), (3, 5), (2, 3000), (1, 4)]),
    density=st.sampled_from([0.0, 0.001, 0.1, 0.5, 0.95, 1.0]),
    random_bits=st.booleans(),
)
def test_the_smallest_codec_is_chosen_by_exact_size_and_ties_go_to_the_first(shape, density, random_bits):
    tensor = make(shape, density, 3)
    if random_bits:  # so that no plane of the values shrinks
        bits = np.random.default_rng(0).integers(0, 1 << 32, tensor.mask.active, np.uint32)
        tensor = SparseTensor(tensor.mask, bits.view(np.float32))
    name, streams = encode_smallest(tensor)
    sizes = {
        other: sum(array.nbytes for array in codec.encode(tensor).values())
        for other, codec in CODECS.items()
        if codec.fits(tensor)
    }
    assert sum(array.nbytes for array in streams.values()) == sizes[name]
    assert name == min(sizes, key=lambda other: sizes[other])


SMALLEST = [
    (0.0, "palette"),
    (0.002, "csr"),
    (0.1, "delta"),
    (0.5, "bitmask"),
    (1.0, "dense"),
    (0.3, "palette"),
    (0.25, "nm"),
]
"""(density of a layer, its smallest codec); a codec that is the smallest for no layer would not be worth a reader."""


def test_every_codec_has_a_layer_for_which_it_is_the_smallest():
    assert {codec for _, codec in SMALLEST} == set(CODECS)


@pytest.mark.parametrize("density, codec", SMALLEST)
def test_every_codec_is_the_smallest_for_some_layer(density, codec):
    shape = (1, 1500) if codec == "csr" else (9, 9)
    mask = Mask.from_bool(np.random.default_rng(1).random(shape) < density)
    if codec == "nm":
        mask = Mask.from_bool(np.random.default_rng(1).random((64, 16, 4)).argsort(axis=2).reshape(64, 64) == 0)
    if codec in ("delta", "palette"):
        mask = make((64, 64), density, 1).mask
    highest = 16 if codec == "palette" else 1 << 32
    bits = np.random.default_rng(0).integers(0, highest, mask.active, np.uint32)
    assert encode_smallest(SparseTensor(mask, bits.view(np.float32)))[0] == codec


def test_planes_that_hardly_shrink_are_stored_raw():
    random = np.random.default_rng(0)
    tensor = SparseTensor(Mask.full((100_000,)), random.normal(size=100_000).astype(np.float32))
    stream = CODECS["delta"].encode(tensor)["values"].tobytes()
    lengths, at = [], 0
    for _ in range(4):
        lengths.append(int.from_bytes(stream[at : at + 8], "little"))
        at += 8 + lengths[-1]
    assert lengths[:3] == [100_000] * 3 and lengths[3] < 40_000


@pytest.mark.parametrize("name", EVERY_MASK)
@settings(max_examples=60)
@given(data=st.data())
def test_damaged_streams_are_refused_or_decode_to_a_valid_tensor(name, data):
    tensor = make((12, 17), data.draw(st.sampled_from([0.1, 0.6])), data.draw(st.integers(0, 9)))
    streams = {key: array.copy() for key, array in CODECS[name].encode(tensor).items()}
    key = data.draw(st.sampled_from(sorted(streams)))
    raw = bytearray(streams[key].tobytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    if data.draw(st.booleans()):
        raw = raw[: -streams[key].itemsize]
        streams[key] = np.frombuffer(bytes(raw), streams[key].dtype)
    else:
        streams[key] = np.frombuffer(bytes(raw), streams[key].dtype).reshape(streams[key].shape)
    try:
        decoded = CODECS[name].decode(streams, (12, 17), tensor.mask.active, np.dtype(np.float32))
    except FormatError:
        return
    assert decoded.values.shape == (tensor.mask.active,)
    positions = decoded.mask.positions
    assert (np.diff(positions) > 0).all()
    assert positions.size == 0 or (positions[0] >= 0 and positions[-1] < math.prod((12, 17)))


def bomb(nbytes):
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    return np.frombuffer(coder.compress(bytes(nbytes)) + coder.flush(), np.uint8)


def behind_lengths(*planes):
    return np.frombuffer(b"".join(len(plane).to_bytes(8, "little") + bytes(plane) for plane in planes), np.uint8)


@pytest.mark.parametrize("stream", ["mask", "values"])
def test_a_deflate_bomb_is_refused_without_decompressing_it(stream):
    packed = bomb(1 << 28)
    tensor = SparseTensor(Mask((2000, 2000), np.arange(0, 4_000_000, 3)), np.ones(1_333_334, np.float32))
    streams = CODECS["delta"].encode(tensor)
    streams[stream] = packed if stream == "mask" else behind_lengths(packed, b"", b"", b"")
    tracemalloc.start()
    with pytest.raises(FormatError, match="does not end where it should"):
        CODECS["delta"].decode(streams, (2000, 2000), tensor.mask.active, np.dtype(np.float32))
    assert tracemalloc.get_traced_memory()[1] < 100 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    "values",
    [
        b"",
        b"\0" * 7,
        behind_lengths(b"ab", b"ab", b"ab"),
        behind_lengths(b"ab", b"ab", b"ab", b"abc"),
        behind_lengths(b"ab", b"ab", b"ab", b"ab", b"ab"),
        behind_lengths(b"ab", b"ab", b"ab", b"a"),
        (1 << 63).to_bytes(8, "little") + b"abababab",
    ],
)
def test_planes_that_do_not_fill_their_stream_are_refused(values):
    streams = CODECS["delta"].encode(SparseTensor(Mask((4,), np.array([0, 2])), np.ones(2, np.float32)))
    streams["values"] = np.frombuffer(bytes(values), np.uint8)
    with pytest.raises(FormatError):
        CODECS["delta"].decode(streams, (4,), 2, np.dtype(np.float32))


@pytest.mark.parametrize(
    "change",
    [
        {"indptr": [0, 3, 2]},
        {"indptr": [0, 1, 4]},
        {"indptr": [1, 2, 3]},
        {"indptr": [0, 3]},
        {"indices": [0, 2, 5]},
        {"indices": [-1, 2, 1]},
        {"indices": [2, 0, 1]},
        {"indices": [2, 2, 1]},
        {"indices": [0, 2]},
        {"values": [1.0, 2.0]},
    ],
)
def test_csr_that_scipy_would_trust_is_refused(change):
    tensor = SparseTensor(Mask((2, 5), np.array([0, 2, 6])), np.ones(3, np.float32))
    streams = CODECS["csr"].encode(tensor)
    streams |= {name: np.array(values, streams[name].dtype) for name, values in change.items()}
    with pytest.raises(FormatError):
        CODECS["csr"].decode(streams, (2, 5), 3, np.dtype(np.float32))


def test_to_dense_writes_into_the_array_that_it_is_given():
    tensor = make((6, 7), 0.4, 0)
    out = np.zeros(42, np.float32)
    assert np.shares_memory(tensor.to_dense(out), out)
    np.testing.assert_array_equal(bits(out), bits(tensor.to_dense().reshape(-1)))
