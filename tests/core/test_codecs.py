import math

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from dsr_tool.core.codecs import CODECS, SparseTensor, bitmask_bytes, csr_bytes, encode_smallest
from dsr_tool.core.layers import matrix_shape
from dsr_tool.core.mask import Mask
from dsr_tool.errors import FormatError

SHAPES = [(1,), (7,), (3, 5), (64, 33), (4, 3, 3, 3), (1, 2000), (0, 4), (2, 1, 1)]


def make(shape, density, seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    mask = Mask.from_bool(rng.random(shape) < density)
    values = rng.normal(size=mask.active).astype(dtype)
    values[rng.random(mask.active) < 0.1] = -0.0
    return SparseTensor(mask, values)


def bits(array):
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


@pytest.mark.parametrize("name", CODECS)
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
@pytest.mark.parametrize("name", CODECS)
def test_special_values_keep_their_bits(name, special):
    tensor = SparseTensor(
        Mask.from_bool(np.array([[True, False], [True, True]])), np.array([1, special, 2], np.float32)
    )
    decoded = CODECS[name].decode(CODECS[name].encode(tensor), (2, 2), 3, np.dtype(np.float32))
    np.testing.assert_array_equal(bits(decoded.values), bits(tensor.values))


def test_csr_is_what_scipy_makes_of_the_matrix_view():
    tensor = make((16, 8, 3, 3), 0.2, 1)
    streams = CODECS["csr"].encode(tensor)
    referee = scipy.sparse.csr_matrix(tensor.to_dense().reshape(matrix_shape(tensor.mask.shape)))
    referee.data[referee.data == 0] = 0
    ours = scipy.sparse.csr_matrix(
        (streams["values"], streams["indices"], streams["indptr"]), shape=matrix_shape(tensor.mask.shape)
    )
    ours.check_format(full_check=True)
    np.testing.assert_array_equal(ours.toarray(), referee.toarray())


@pytest.mark.parametrize("density", [0.02, 0.05, 0.1, 0.2])
def test_delta_masks_come_within_two_per_cent_of_the_entropy_bound(density):
    tensor = make((512, 2304), density, 0)
    coded = CODECS["delta"].encode(tensor)["mask"].nbytes * 8
    assert coded <= 1.02 * tensor.mask.entropy_bound_bits


@given(st.sampled_from(SHAPES), st.sampled_from([0.0, 0.1, 1.0]), st.sampled_from([np.float16, np.float32]))
def test_closed_forms_are_the_sizes_of_the_streams(shape, density, dtype):
    tensor = make(shape, density, 0, dtype)
    for name, size in (("csr", csr_bytes(tensor)), ("bitmask", bitmask_bytes(tensor))):
        assert size == sum(array.nbytes for array in CODECS[name].encode(tensor).values())


def test_the_smallest_codec_is_chosen_by_exact_size():
    for density in (0.0, 0.001, 0.1, 0.5, 1.0):
        tensor = make((64, 64), density, 3)
        _, streams = encode_smallest(tensor)
        size = sum(array.nbytes for array in streams.values())
        others = [CODECS[n].encode(tensor) for n in ("delta", "bitmask", "csr")]
        assert size == min(sum(array.nbytes for array in streams.values()) for streams in others)


@pytest.mark.parametrize("name", CODECS)
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


def test_a_stream_that_would_unpack_to_too_much_is_refused():
    import zlib

    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = np.frombuffer(coder.compress(bytes(50_000_000)) + coder.flush(), np.uint8)
    streams = {**CODECS["delta"].encode(make((8, 8), 0.3, 0)), "mask": bomb}
    with pytest.raises(FormatError, match="does not end where it should"):
        CODECS["delta"].decode(streams, (8, 8), 19, np.dtype(np.float32))
