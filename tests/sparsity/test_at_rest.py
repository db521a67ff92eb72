"""Tensors at rest are the same tensors in less memory."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsr_tool.sparsity.at_rest import BitMask, arrays_of, at_rest, dtype_of
from dsr_tool.sparsity.grid import GridTensor
from dsr_tool.sparsity.grid_rounding import to_grid
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor


def tensor_of(seed: int, shape: tuple[int, ...], density: float) -> SparseTensor:
    rng = np.random.default_rng(seed)
    mask = Mask.from_bool(np.asarray(rng.random(shape) < density))
    return SparseTensor(mask, rng.standard_normal(mask.active).astype(np.float32))


@given(
    st.integers(0, 2**32), st.sampled_from(((), (7,), (5, 3), (4, 2, 3, 3), (3, 0), (300, 2))),
    st.sampled_from((0.0, 0.01, 0.1, 0.5, 1.0)), st.booleans(),
)  # fmt: skip
def test_masks_and_values_stay_as_they_are(seed, shape, density, grid):
    tensor = tensor_of(seed, shape, density)
    tensor = to_grid(tensor, 8) if grid else tensor
    kept = at_rest(tensor)
    assert type(kept) is type(tensor)
    assert kept.mask.equals(tensor.mask) and tensor.mask.equals(kept.mask)
    assert kept.mask.active == tensor.mask.active and kept.mask.density == tensor.mask.density
    assert (kept.mask.stored is None) == (tensor.mask.stored is None)
    assert kept.mask.positions.dtype == np.int64
    assert np.array_equal(kept.mask.bits, tensor.mask.bits)
    assert kept.to_dense().tobytes() == tensor.to_dense().tobytes()
    assert dtype_of(kept) == dtype_of(tensor) == np.float32
    assert sum(array.nbytes for array in arrays_of(kept)) <= sum(array.nbytes for array in arrays_of(tensor))


def test_a_grid_takes_a_byte_for_a_weight_and_a_bit_for_an_entry():
    kept = at_rest(to_grid(tensor_of(0, (64, 800), 0.1), 8))
    assert isinstance(kept, GridTensor) and isinstance(kept.mask, BitMask)
    assert sum(array.nbytes for array in arrays_of(kept)) == 64 * 800 / 8 + kept.mask.active + 64 * 4


def test_few_positions_and_no_positions_stay():
    for density in (0.001, 1.0):
        tensor = tensor_of(0, (64, 800), density)
        assert at_rest(tensor) is tensor


@pytest.mark.parametrize("density", [0.001, 0.1, 1.0])
def test_another_shape_shares_the_bits(density):
    mask = at_rest(tensor_of(0, (64, 800), density)).mask
    other = mask.reshaped((64, 20, 40))
    assert type(other) is type(mask)
    assert (other.shape, other.active) == ((64, 20, 40), mask.active)
    assert np.array_equal(other.to_bool().reshape(64, 800), mask.to_bool())
    if isinstance(mask, BitMask):
        assert np.shares_memory(other.bits, mask.bits)


@pytest.mark.parametrize("positions", [[-1, 2], [0, 12], [3, 3], [5, 2]])
def test_positions_of_a_damaged_file_are_left_to_those_who_check_them(positions):
    tensor = SparseTensor(Mask((3, 4), np.array(positions)), np.ones(2, np.float32))
    assert at_rest(tensor) is tensor
