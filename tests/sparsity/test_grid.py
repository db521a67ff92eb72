"""Grids keep zero and the mask, round each value by half a step, and find themselves again bit for bit."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsr_tool.sparsity.grid import GridTensor, largest_code, row_counts
from dsr_tool.sparsity.grid_rounding import balanced, best_scales, distance, on_grid, to_grid
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor

BITS = (4, 5, 6, 8)


@st.composite
def tensors(draw):
    random = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    shape = draw(st.sampled_from([(), (7,), (1, 1), (5, 3), (4, 2, 3, 3), (3, 0), (300, 2)]))
    spread = draw(st.sampled_from([0.0, 3.0, 12.0]))
    array = random.standard_normal(shape) * np.exp(spread * random.standard_normal(shape[:1] + (1,) * (len(shape) - 1)))
    density = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    mask = Mask.from_bool(np.asarray(random.random(shape) < density))
    return SparseTensor.from_dense(np.asarray(array, np.float32), mask)


@given(tensors(), st.sampled_from(BITS))
def test_rounding_stays_within_half_a_step_and_keeps_mask_and_zeros(tensor, bits):
    found = to_grid(tensor, bits)
    assert found.mask is tensor.mask and found.codes.dtype == np.int8 and found.scales.dtype == np.float32
    assert np.abs(found.codes.astype(int)).max(initial=0) <= largest_code(bits)
    assert distance(found, tensor) <= 0.5 + 1e-5
    assert found.values.dtype == np.float32 and not found.values[tensor.values == 0].any()
    rows = np.repeat(np.arange(len(found.scales)), row_counts(tensor.mask))
    assert np.array_equal(found.values, found.codes * found.scales[rows])


@given(tensors(), st.sampled_from(BITS))
def test_a_grid_is_found_again_in_its_floats(tensor, bits):
    once = to_grid(tensor, bits)
    stored = SparseTensor(tensor.mask, once.values)
    again = on_grid(stored, bits)
    assert again is not None and again.values.tobytes() == stored.values.tobytes()
    assert to_grid(stored, bits).values.tobytes() == stored.values.tobytes()


@given(tensors(), st.sampled_from(BITS))
def test_no_scale_that_reaches_the_largest_weight_is_better(tensor, bits):
    found, q = to_grid(tensor, bits), largest_code(bits)
    for row, (start, count) in enumerate(zip(np.cumsum(row_counts(tensor.mask)), row_counts(tensor.mask), strict=True)):
        own = tensor.values[start - count : start].astype(np.float64)
        if not own.any():
            assert found.scales[row] == 0
            continue
        step = np.abs(own).max() / q
        plain = ((np.rint(own / step) * step - own) ** 2).sum()
        mine = ((found.values[start - count : start] - own) ** 2).sum()
        # The scale has 11 bits, which moves each value by up to one part in 2048.
        assert np.sqrt(mine) <= np.sqrt(plain) * 1.001 + np.sqrt((own**2).sum()) / 2048


def test_eight_bits_lose_less_than_four():
    tensor = SparseTensor.from_dense(
        np.random.default_rng(0).standard_normal((64, 576)).astype(np.float32), Mask((64, 576))
    )
    errors = [np.square(to_grid(tensor, bits).values - tensor.values).sum() for bits in (8, 6, 5, 4)]
    assert errors == sorted(errors) and errors[-1] > 100 * errors[0]


@pytest.mark.parametrize("values", [[1e-45, 0], [3.4e38, -3.4e38], [0, -0.0], [1e-30, 1e30]])
def test_extreme_values_have_normal_scales(values):
    tensor = SparseTensor(Mask((1, 2)), np.array(values, np.float32))
    found = to_grid(tensor, 8)
    assert np.isfinite(found.values).all()
    assert (found.scales == 0).all() or (found.scales >= np.finfo(np.float32).smallest_normal).all()


def test_floats_off_every_grid_are_not_found():
    tensor = SparseTensor(Mask((1, 3)), np.array([1, 0.5, np.float32(1 / 3)], np.float32))
    assert on_grid(tensor, 4) is None and on_grid(tensor, 8) is None
    assert on_grid(SparseTensor(Mask((1, 2)), np.array([1, -0.0], np.float32)), 8) is None


def test_scaling_turns_codes_around_and_keeps_them_symmetric():
    tensor = GridTensor(Mask((3, 2)), np.array([127, -3, 4, 5, 6, -7], np.int8), np.array([1, 2, 3], np.float32))
    found = tensor.scaled(np.array([-0.5, 1e-50, 2]))
    assert found.codes.tolist() == [-127, 3, 0, 0, 6, -7] and found.scales.tolist() == [0.5, 0, 6]
    assert found.values.tolist() == [-63.5, 1.5, 0, 0, 36, -42]


def test_distance_counts_steps_and_forgives_what_was_cut_off():
    exact = SparseTensor(Mask((2, 2)), np.array([1.0, 9.0, 0.5, -0.5], np.float32))
    codes = np.array([3, 7, 1, 1], np.int8)
    assert distance(GridTensor(exact.mask, codes, np.array([1, 1], np.float32)), exact) == 2
    assert distance(GridTensor(exact.mask, codes, np.array([0, 1], np.float32)), exact) == np.inf
    # Beyond the largest code of its own channel, and of its sign.
    assert (
        distance(GridTensor(exact.mask, np.array([1, 7, 1, -1], np.int8), np.array([1, 1], np.float32)), exact) == 0.5
    )


def test_values_whose_scale_folding_made_zero_are_met():
    exact = SparseTensor(Mask((2, 2)), np.array([1e-37, -1e-36, 1.0, 2.0], np.float32))
    once = to_grid(SparseTensor(exact.mask, exact.values * np.array([1e36, 1e36, 1, 1], np.float32)), 8)
    assert distance(once.scaled(np.array([1e-36, 1])), exact) <= 0.5 + 1e-2
    assert distance(once.scaled(np.array([0, 1])), SparseTensor(exact.mask, once.values)) == np.inf


def test_a_vanishing_scale_cuts_nothing_off():
    exact = SparseTensor(Mask((1, 2)), np.array([1.0, -1.0], np.float32))
    assert distance(GridTensor(exact.mask, np.array([7, -7], np.int8), np.array([1e-30], np.float32)), exact) > 2


def test_scales_are_searched_block_by_block(monkeypatch):
    tensor = SparseTensor.from_dense(
        np.random.default_rng(1).standard_normal((40, 9)).astype(np.float32), Mask((40, 9))
    )
    whole = best_scales(tensor, 5)
    monkeypatch.setattr("dsr_tool.sparsity.grid_rounding._BLOCK", 25)
    assert np.array_equal(best_scales(tensor, 5), whole)


@given(tensors(), st.sampled_from(BITS))
def test_errors_of_a_channel_cancel_within_one_step_of_each_value(tensor, bits):
    nearest, q = to_grid(tensor, bits), largest_code(bits)
    found = balanced(nearest, tensor, bits)
    assert found.mask is tensor.mask and found.scales is nearest.scales and found.codes.dtype == np.int8
    assert np.abs(found.codes.astype(int)).max(initial=0) <= q and distance(found, tensor) <= 1 + 1e-5
    assert not found.codes[tensor.values == 0].any()
    ends = np.cumsum(row_counts(tensor.mask))
    for row, (start, end) in enumerate(zip(ends - row_counts(tensor.mask), ends, strict=True)):
        if nearest.scales[row] == 0:
            continue
        steps = tensor.values[start:end] / nearest.scales[row]
        inside = np.abs(steps) <= q
        before, after = ((each.codes[start:end] - steps)[inside].sum(dtype=np.float64) for each in (nearest, found))
        moved = found.codes[start:end] != nearest.codes[start:end]
        assert abs(after) <= abs(before) + 1e-3 and moved.sum() <= np.rint(abs(before))
        # Only codes at an end of the grid may be missing to cancel the rest.
        assert abs(after) <= 0.5 + 1e-3 or (np.abs(nearest.codes[start:end]) == q).any()


@given(tensors(), st.sampled_from(BITS))
def test_values_on_a_grid_have_nothing_to_cancel(tensor, bits):
    once = balanced(to_grid(tensor, bits), tensor, bits)
    stored = SparseTensor(tensor.mask, once.values)
    again = to_grid(stored, bits)
    assert balanced(again, stored, bits).values.tobytes() == stored.values.tobytes()
