"""Solver of one layer: exact counts, no worse than magnitude, and optimal on its mask."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsr_tool.calibrate import solver
from dsr_tool.calibrate.solver import Problem, largest_mask, least_squares, solve


def _problem(seed, blocks=1, rows=8, columns=12, vectors=200, taps=1):
    """Correlated inputs, and targets that the dense weights give up to noise."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    x = draw(blocks, vectors, columns) @ (torch.eye(columns) + 0.5 * draw(blocks, columns, columns))
    weight = draw(blocks, rows, columns)
    t = x @ weight.mT + 0.3 * draw(blocks, vectors, rows)
    count = torch.full((blocks,), float(vectors))
    importance = 0.1 + draw(blocks, rows).square()
    return Problem(weight, x.mT @ x / vectors, t.mT @ x / vectors, importance, count, taps), x, t


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 10), st.integers(1, 16), st.floats(0.01, 1))
@example(247593, 1, 5, 3, 0.32)  # ADMM alone is worse than magnitude
def test_the_count_is_exact_and_the_error_no_worse_than_by_magnitude(seed, blocks, rows, columns, density):
    problem, _, _ = _problem(seed, blocks, rows, columns)
    count = max(1, int(density * problem.weight.numel()))
    found = solve(problem, count)
    assert int(found.mask.sum()) == count
    assert not found.weight[~found.mask].any()
    # The error is that of the damped problem, which is what is solved; with strong damping the two differ.
    damped, scale = solver._normalised(problem)
    by_magnitude = solver.values(problem, largest_mask(problem.weight.square(), count, 1))
    slack = 1e-4 * abs(damped.error(damped.weight))
    assert damped.error(found.weight / scale) <= damped.error(by_magnitude / scale) + slack


def test_values_equal_the_least_squares_of_numpy_on_their_mask(monkeypatch):
    monkeypatch.setattr(solver, "_DAMPING", 0.0)
    monkeypatch.setattr(solver, "_FEW", 0.0)
    problem, x, t = _problem(0, blocks=2)
    found = solve(problem, 60)
    for block in range(2):
        for row in range(8):
            active = found.mask[block, row]
            expected, *_ = np.linalg.lstsq(x[block][:, active].numpy(), t[block][:, row].numpy(), rcond=None)
            np.testing.assert_allclose(found.weight[block, row, active], expected, rtol=2e-3, atol=2e-3)


def test_the_problem_stays_as_it_is_and_chunks_change_rounding_alone(monkeypatch):
    problem, _, _ = _problem(2, blocks=2, rows=30, columns=20)
    before = [tensor.clone() for tensor in (problem.weight, problem.moments, problem.target)]
    whole = solve(problem, 400)
    assert all(
        torch.equal(*pair) for pair in zip(before, (problem.weight, problem.moments, problem.target), strict=True)
    )
    monkeypatch.setattr(solver, "_CHUNK", 1)  # one row at a time
    single = solve(problem, 400)
    assert torch.equal(whole.mask, single.mask)
    torch.testing.assert_close(single.weight, whole.weight, rtol=1e-4, atol=1e-5)


def test_the_gradient_is_zero_on_the_mask_and_both_ways_to_solve_agree():
    problem, _, _ = _problem(1, rows=30, columns=20)
    mask = largest_mask(problem.weight.square(), 200, 1)
    exact = least_squares(problem, mask)
    gradient = (exact @ problem.moments - problem.target) * mask
    assert float(gradient.abs().max()) < 1e-3 * float(problem.target.abs().max())
    nearly = solver._conjugate_gradients(problem, mask)
    torch.testing.assert_close(nearly, exact, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("density", [0.2, 0.5])
def test_correlated_inputs_leave_far_less_error_than_magnitude(density):
    """The point of second-order reconstruction; a mask by magnitude with the same values is the peer."""
    problem, _, t = _problem(2, rows=40, columns=60, vectors=2000)
    count, total = int(density * problem.weight.numel()), float((t.square().mean(1) * problem.importance).sum())
    errors = [problem.error(solve(problem, count).weight) + total]
    errors.append(problem.error(solver.values(problem, largest_mask(problem.weight.square(), count, 1))) + total)
    assert errors[0] < 0.85 * errors[1]


def test_whole_kernels_are_active_together():
    problem, _, _ = _problem(3, columns=36, taps=9)
    found = solve(problem, 9 * 7)
    kernels = found.mask.unflatten(-1, (9, -1))
    assert int(found.mask.sum()) == 63
    assert torch.equal(kernels.any(-2), kernels.all(-2))


def test_inputs_that_are_always_zero_do_no_harm():
    problem, _, _ = _problem(4)
    for tensor in (problem.moments, problem.target):
        tensor[..., :4] = 0
    problem.moments[:, :4] = 0
    found = solve(problem, 40)
    assert found.weight.isfinite().all()
    assert int(found.mask.sum()) == 40
