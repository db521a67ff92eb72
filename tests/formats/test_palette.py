"""Palettes keep every bit of weights with few distinct values, and are refused unless they are well formed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsr_tool.errors import FormatError
from dsr_tool.formats.archive import open_archive, write_archive
from dsr_tool.formats.codecs import CODECS, encode_smallest
from dsr_tool.formats.coding import encode_planes
from dsr_tool.formats.palette import least_palette_bytes
from dsr_tool.sparsity.layers import LayerSpec
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor

PALETTE = CODECS["palette"]
FEW = SparseTensor(Mask((2, 5), np.array([0, 2, 6, 9])), np.array([0.5, -1, 0.5, 0.25], np.float32))


def drawn(distinct, shape=(300, 250), density=0.9):
    random = np.random.default_rng(distinct)
    mask = Mask.from_bool(random.random(shape) < density)
    bits = np.unique(random.integers(0, 1 << 30, 2 * distinct, np.uint32))
    table = random.permutation(bits)[:distinct].view(np.float32)
    return SparseTensor(mask, table[np.arange(mask.active) % distinct])


@pytest.mark.parametrize("distinct, width", [(1, 1), (256, 1), (257, 2), (65_536, 2), (65_537, 4)])
def test_indices_have_the_smallest_width_and_round_trip(distinct, width):
    tensor = drawn(distinct)
    streams = PALETTE.encode(tensor)
    assert len(streams["table"]) == distinct
    assert int.from_bytes(streams["indices"][:8].tobytes(), "little") <= tensor.mask.active
    index_type = np.dtype(f"u{width}")
    bits = tensor.values.view(np.uint32)
    expected = encode_planes(np.unique(bits, return_inverse=True)[1].astype(index_type))
    np.testing.assert_array_equal(streams["indices"], expected)
    decoded = PALETTE.decode(streams, tensor.mask.shape, tensor.mask.active, np.dtype(np.float32))
    assert decoded.values.tobytes() == tensor.values.tobytes()


def test_zeros_of_both_signs_and_nans_of_different_bits_are_different_values():
    values = np.array([0x0, 0x80000000, 0x7FC00000, 0x7FC00001, 0x0], np.uint32).view(np.float32)
    streams = PALETTE.encode(SparseTensor(Mask.full((5,)), values))
    assert len(streams["table"]) == 4
    assert PALETTE.decode(streams, (5,), 5, np.dtype(np.float32)).values.tobytes() == values.tobytes()


@given(distinct=st.integers(1, 3000), density=st.sampled_from([0.01, 0.4, 1.0]))
def test_the_lower_bound_is_never_above_the_size(distinct, density):
    tensor = drawn(distinct, (50, 60), density)
    assert least_palette_bytes(tensor) <= PALETTE.nbytes(tensor)


def test_few_values_take_a_fraction_of_delta():
    tensor = drawn(16)
    name, streams = encode_smallest(tensor)
    assert name == "palette"
    assert sum(array.nbytes for array in streams.values()) < 0.5 * CODECS["delta"].nbytes(tensor)


@pytest.mark.parametrize(
    "change",
    [
        {"table": np.array([0.25, 0.5], np.float32)},
        {"table": np.array([0.25, 0.5, 0.5, -1], np.float32)},
        {"table": np.array([0.5, 0.25, -1], np.float32)},
        {"table": np.array([0.25, 0.5, 1, 2, 3], np.float32)},
        {"table": np.array([], np.float32)},
        {"table": np.array([0.25, 0.5, -1], np.float64)},
        {"table": np.array([[0.25, 0.5, -1]], np.float32)},
        {"indices": encode_planes(np.array([1, 3, 1, 0], np.uint8))},
        {"indices": encode_planes(np.array([1, 2, 1], np.uint8))},
        {"indices": encode_planes(np.array([1, 2, 1, 0, 0], np.uint8))},
        {"indices": encode_planes(np.array([1, 2, 1, 0], np.uint16))},
        {"indices": np.array([1, 2, 1, 0], np.int32)},
        {"mask": np.zeros(0, np.uint8)},
        {"more": np.zeros(1, np.uint8)},
    ],
)
def test_palettes_that_are_not_well_formed_are_refused(change):
    streams = PALETTE.encode(FEW)
    PALETTE.decode(streams, (2, 5), 4, np.dtype(np.float32))
    with pytest.raises(FormatError):
        PALETTE.decode({**streams, **change}, (2, 5), 4, np.dtype(np.float32))


@pytest.mark.parametrize("values, codec", [(16, "palette"), (1, "packed"), (2000, "packed")])
def test_a_bias_gets_a_palette_only_if_that_pays_and_it_is_no_constant(tmp_path, small_model, values, codec):
    tensors, specs, graph, config = small_model
    tensors["bias"] = drawn(values, (2000,), 1.0)
    specs["bias"] = LayerSpec("bias", (2000,), "Linear", "dense", False, "bias of Linear")
    write_archive(tmp_path / "a.dsr", tensors, specs, graph, config)
    archive = open_archive(tmp_path / "a.dsr")
    assert archive.entries["bias"].codec == codec
    assert archive.tensor("bias").values.tobytes() == tensors["bias"].values.tobytes()
