"""Masks N:M: near the entropy, one encoding for each mask, and refused unless they are well formed."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsr_tool.errors import FormatError, UsageError
from dsr_tool.formats import manifest
from dsr_tool.formats.archive import open_archive, write_archive
from dsr_tool.formats.codecs import CODECS, column_bytes, encode_smallest, size_columns
from dsr_tool.formats.footprint import footprint
from dsr_tool.formats.grid import GRIDS, encode_smallest_grid
from dsr_tool.formats.groups import decode_groups, encode_groups, groups_bytes
from dsr_tool.sparsity.granularity import Blocks, Granularity
from dsr_tool.sparsity.grid import GridTensor
from dsr_tool.sparsity.layers import LayerSpec
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.pattern import found_groups, found_pattern, pattern_bits
from dsr_tool.sparsity.tensor import SparseTensor

FP32 = np.dtype(np.float32)


def drawn(shape, kept, group, seed=0):
    """Returns a random mask with `kept` of every `group` input channels."""
    blocks = Blocks.of(shape, group)
    ranks = np.random.default_rng(seed).random((blocks.count, group)).argsort(axis=1).argsort(axis=1)
    return Mask.from_bool(blocks.join(ranks < kept).reshape(shape))


def weights(mask, seed=0):
    return SparseTensor(mask, np.random.default_rng(seed).normal(size=mask.active).astype(np.float32))


@st.composite
def patterns(draw):
    group = draw(st.integers(2, 64))
    shape = (draw(st.integers(1, 9)), group * draw(st.integers(1, 3)), *draw(st.sampled_from([(), (1,), (2,), (2, 3)])))
    return shape, draw(st.integers(1, group - 1)), group, draw(st.integers(0, 99))


@given(patterns())
def test_every_mask_round_trips_and_has_the_stated_size(case):
    shape, kept, group, seed = case
    mask, pattern = drawn(shape, kept, group, seed), Granularity("N:M", kept, group)
    coded = encode_groups(mask, pattern)
    assert coded.nbytes == groups_bytes(mask, pattern)
    np.testing.assert_array_equal(decode_groups(coded, shape, mask.active).positions, mask.positions)
    tensor = weights(mask)
    streams = CODECS["nm"].encode(tensor)  # perhaps by a smaller pattern that the mask has as well
    decoded = CODECS["nm"].decode(streams, shape, mask.active, FP32)
    np.testing.assert_array_equal(decoded.mask.positions, mask.positions)
    assert decoded.values.tobytes() == tensor.values.tobytes()


@pytest.mark.parametrize("shape", [(7, 12), (5, 8, 3, 1), (3, 4, 2)])
def test_pieces_of_a_large_mask_make_the_same_bytes(shape, monkeypatch):
    mask, pattern = drawn(shape, 2, 4), Granularity("N:M", 2, 4)
    coded = encode_groups(mask, pattern)
    monkeypatch.setattr("dsr_tool.formats.groups._CHUNK", 5)
    monkeypatch.setattr("dsr_tool.sparsity.pattern._CHUNK", 2 * math.prod(shape[1:]))
    assert found_groups(mask) == pattern
    assert encode_groups(mask, pattern).tobytes() == coded.tobytes()
    assert decode_groups(coded, shape, mask.active).equals(mask)
    torn = mask.to_bool().reshape(-1)
    torn[[np.flatnonzero(torn)[-1], np.flatnonzero(~torn)[0]]] = [False, True]
    assert found_groups(Mask.from_bool(torn.reshape(shape))) != pattern


@pytest.mark.parametrize("kept, group, most", [(2, 4, 1.04), (1, 4, 1.01), (4, 8, 1.05), (1, 16, 1.01), (8, 16, 1.18)])
def test_masks_come_near_the_entropy(kept, group, most):
    mask = drawn((192, 480), kept, group)
    entropy = mask.size / group * math.log2(math.comb(group, kept))
    assert pattern_bits(mask) == pytest.approx(entropy)
    assert entropy <= 8 * groups_bytes(mask, Granularity("N:M", kept, group)) <= most * entropy


def test_2_to_4_takes_eight_bytes_for_24_groups():
    mask = drawn((24, 4), 2, 4)
    coded = encode_groups(mask, Granularity("N:M", 2, 4))
    assert coded.nbytes == 10 and coded[:2].tolist() == [2, 4]
    word = int.from_bytes(coded[2:].tobytes(), "little")
    # The choices of two of four places by the larger one: 01 02 12 03 13 23.
    order = [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]
    assert [order[word // 6**i % 6] for i in range(24)] == [tuple(np.flatnonzero(row)) for row in mask.to_bool()]


def test_the_smallest_group_is_found_and_others_are_not():
    assert found_groups(drawn((20, 24, 3, 3), 2, 4)) == Granularity("N:M", 2, 4)
    assert found_groups(drawn((20, 24), 1, 2)) == Granularity("N:M", 1, 2)
    mask = drawn((20, 24), 2, 4).to_bool()
    mask[3, [4, 5, 6, 7]] = [True, True, True, False]
    mask[4, [4, 5, 6, 7]] = [True, False, False, False]
    assert found_groups(Mask.from_bool(mask)) is None
    assert found_groups(Mask.full((8, 8))) is found_groups(Mask((8, 8), np.zeros(0, np.int64))) is None
    assert found_groups(Mask.from_bool(np.arange(8) % 2 == 0)) is None


def test_the_pattern_of_a_mask_is_named():
    random = np.random.default_rng(0)
    assert str(found_pattern(drawn((20, 24, 3, 3), 2, 4))) == "2:4"
    kernels = np.repeat(random.random((10, 7)) < 0.4, 9).reshape(10, 7, 3, 3)
    assert str(found_pattern(Mask.from_bool(kernels))) == "kernel"
    fan_in = random.random((10, 63)).argsort(axis=1) < 17
    assert str(found_pattern(Mask.from_bool(fan_in.reshape(10, 7, 3, 3)))) == "fan-in"
    assert str(found_pattern(Mask.from_bool(fan_in))) == "fan-in"  # and 17:63
    assert found_pattern(Mask.from_bool(random.random((10, 63)) < 0.3)) is None
    assert found_pattern(Mask.from_bool(random.random((1, 63)) < 0.3)) is None


def test_auto_takes_it_where_it_is_the_smallest():
    tensor = weights(drawn((64, 64), 2, 4))
    name, streams = encode_smallest(tensor)
    assert name == "nm"
    bitmask, runs = tensor.mask.bits.nbytes, CODECS["delta"].encode(tensor)["mask"].nbytes
    assert streams["mask"].nbytes < 0.72 * min(bitmask, runs)


def test_a_grid_has_groups_where_they_are_smaller():
    mask = drawn((64, 64), 2, 4)
    codes = np.random.default_rng(0).integers(-127, 128, mask.active).astype(np.int8)
    tensor = GridTensor(mask, codes, np.full(64, 0.5, np.float32))
    name, streams = encode_smallest_grid(tensor)
    decoded = GRIDS[name](streams, mask.shape, mask.active, FP32)
    assert name == "grid-nm" and decoded.mask.equals(mask) and decoded.codes.tobytes() == codes.tobytes()
    sparse = Mask.from_bool(np.random.default_rng(0).random((64, 64)) < 0.4)
    assert encode_smallest_grid(GridTensor(sparse, codes[: sparse.active], tensor.scales))[0] == "grid"


def changed(coded, at, value):
    coded = coded.copy()
    coded[at] = value
    return coded


GOOD = encode_groups(drawn((6, 8), 2, 4), Granularity("N:M", 2, 4))


@pytest.mark.parametrize(
    "coded",
    [
        GOOD[:0],
        GOOD[:1],
        GOOD[:-1],
        GOOD[:2],
        np.append(GOOD, np.uint8(0)),
        np.concatenate([GOOD, np.zeros(8, np.uint8)]),
        changed(GOOD, 0, 0),
        changed(GOOD, 0, 4),
        changed(GOOD, 0, 1),
        changed(GOOD, 1, 8),
        changed(GOOD, 1, 0),
        changed(GOOD, 1, 3),
        changed(GOOD, 1, 255),
        changed(GOOD, 9, 255),  # digits behind the twelfth group
    ],
)
def test_groups_that_are_not_well_formed_are_refused(coded):
    assert decode_groups(GOOD, (6, 8), 24).active == 24
    with pytest.raises(FormatError):
        decode_groups(coded, (6, 8), 24)


@pytest.mark.parametrize("shape, active", [((48,), 24), ((6, 8), 23), ((12, 4), 25), ((8, 6), 24), ((0, 8), 0)])
def test_groups_of_another_shape_or_count_are_refused(shape, active):
    with pytest.raises(FormatError):
        decode_groups(GOOD, shape, active)


def test_a_word_beyond_its_groups_is_refused():
    full = encode_groups(drawn((24, 4), 2, 4), Granularity("N:M", 2, 4))
    full = np.concatenate([full[:2], np.full(8, 255, np.uint8)])  # 2^64 - 1 is more than 6^24 - 1
    with pytest.raises(FormatError, match="more groups than it holds"):
        decode_groups(full, (24, 4), 48)


@given(data=st.data())
def test_damaged_groups_are_refused_or_decode_to_a_mask_with_the_pattern(data):
    coded = GOOD.copy()
    coded[data.draw(st.integers(0, len(coded) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        mask = decode_groups(coded, (6, 8), 24)
    except FormatError:
        return
    assert (Blocks.of((6, 8), 4).split(mask.to_bool()).sum(1) == 2).all()


def written(path, small_model, **options):
    tensors, specs, graph, config = small_model
    tensors["fc.weight"] = weights(drawn((8, 40), 2, 4))
    write_archive(path, tensors, specs, graph, config, **options)
    return open_archive(path)


def test_an_archive_of_another_mask_is_refused_by_name(tmp_path, small_model):
    with pytest.raises(UsageError, match="'nm' is for weights with a mask N:M, such as 2:4, and weight 'fc.weight'"):
        write_archive(tmp_path / "a.dsr", *small_model, encoding="nm")
    assert written(tmp_path / "b.dsr", small_model, encoding="nm").entries["fc.weight"].codec == "nm"


def test_readers_of_older_versions_refuse_it_in_one_sentence(tmp_path, small_model, monkeypatch):
    written(tmp_path / "a.dsr", small_model, encoding="nm")
    monkeypatch.setattr(manifest, "is_codec", lambda name: name != "nm")
    with pytest.raises(FormatError, match=r"codec 'nm', which this version cannot read") as refused:
        open_archive(tmp_path / "a.dsr")
    assert str(refused.value).count(";") <= 1


def test_the_bound_of_a_footprint_knows_the_pattern():
    tensor = weights(drawn((8, 40), 2, 4))
    specs = {"w": LayerSpec("w", (8, 40), "Linear", "sparse", True, "weight")}
    bound = footprint({"w": tensor}, specs).prunable.bound_bytes
    assert bound == math.ceil(80 * math.log2(6) / 8) + tensor.values.nbytes
    assert bound < math.ceil(tensor.mask.entropy_bound_bits / 8) + tensor.values.nbytes


def test_the_column_of_coded_bytes_is_that_of_the_smaller_codec():
    both = {name: CODECS[name].nbytes(weights(drawn((64, 64), 2, 4))) for name in ("delta", "nm")}
    assert column_bytes(weights(drawn((64, 64), 2, 4)))["delta"] == both["nm"] < both["delta"]
    other = weights(Mask.from_bool(np.random.default_rng(0).random((64, 64)) < 0.3))
    assert column_bytes(other)["delta"] == CODECS["delta"].nbytes(other)
    assert [column.name for column in size_columns().values()] == ["CSR", "bitmask", "coded"]
