"""Chooses the codes and scales of one layer on a grid, so that its output changes least.

The error of a layer is a quadratic function of its values (`solver.Problem`). Codes start at the nearest ones and are
improved column by column, each for all other codes as they are: cyclic coordinate descent, as in QuantEase (Behdin et
al. 2023, arXiv 2309.01885). Before each sweep, scales are fitted to the codes by least squares.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsr_tool.calibrate.solver import Problem
from dsr_tool.sparsity.grid import LARGEST_SCALE, SMALLEST_SCALE, largest_code, shortened

__all__ = ["GridProblem", "fit_codes"]

_SWEEPS = 4
"""Most passes over all columns. In a prototype on MobileNetV2's layers in 4 bits, one sweep brought the error to .40 of
that of the nearest codes, and four to .35."""

_DAMPING = 0.01
"""Share of the mean diagonal that is added to the second moments, so that inputs hardly seen are no free choice."""

_COLUMNS = 64
"""Columns whose gradients are updated one by one; those behind them get all the changes in one product."""

_MOST_STEPS = 0.999
"""Steps by which a code may lie from its exact value, so that it is one of the two around it; files are verified to
keep 2. Codes within 1.99 steps were no better: MobileNetV2 in 4 bits, calibrated on 64 pictures, had a KL of .130 on
100 others, against .116, and the same answers."""


@dataclass
class GridProblem:
    """A layer, its grid, and the codes that it has so far.

    Attributes:
        problem: the layer; rows are independent, so the importance of outputs does not count.
        active: 1 for active entries, 0 for those that stay zero, shape (blocks, rows, columns).
        scales: one for each entry, shape (blocks, rows, columns) or (blocks, rows, 1); zero where all values are.
        bits: bits of a code.
    """

    problem: Problem
    active: torch.Tensor
    scales: torch.Tensor
    bits: int

    @property
    def own_scales(self) -> bool:
        """True if each row has a scale of its own, which can follow its codes."""
        return self.scales.shape[-1] == 1

    def blocks(self) -> list[GridProblem]:
        """Returns each group, part or slice as a problem of its own."""
        return [
            GridProblem(self.problem.block(i), self.active[i : i + 1], self.scales[i : i + 1], self.bits)
            for i in range(len(self.active))
        ]

    def bounds(self, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the lowest and the highest code that each entry may have on a grid of other scales."""
        q = largest_code(self.bits)
        steps = torch.where(scales > 0, self.problem.weight / scales, 0.0)
        allowed = self.active * (scales > 0)
        # A value beyond the largest code may have that one, however far it lies.
        high = (steps + _MOST_STEPS).clamp_(-q, q).floor_()
        low = torch.minimum((steps - _MOST_STEPS).clamp_(-q, q).ceil_(), high)
        return low * allowed, high * allowed


def fit_codes(grid: GridProblem) -> torch.Tensor:
    """Returns the codes with the smallest error that was found; of rows with own scales, these are fitted in place.

    Returns:
        Whole numbers as float32, shape (blocks, rows, columns).
    """
    damped = _damped(grid.problem)
    low, high = grid.bounds(grid.scales)
    codes = torch.where(grid.scales > 0, grid.problem.weight / grid.scales, 0.0).round_()
    codes = torch.maximum(torch.minimum(codes, high), low)
    for _ in range(_SWEEPS):
        if grid.own_scales:
            _fit_scales(grid, damped, codes, low, high)
        if not _sweep(damped, codes, grid.scales.expand_as(codes), low, high):
            break
    return codes


def _damped(problem: Problem) -> Problem:
    """Returns the problem with a pull of every value towards the exact one."""
    diagonal = problem.moments.diagonal(dim1=-2, dim2=-1)
    damping = _DAMPING * diagonal.mean(-1, keepdim=True).clamp_min(1e-12)
    moments = problem.moments.clone()
    moments.diagonal(dim1=-2, dim2=-1).add_(damping)
    target = problem.target + problem.weight * damping[:, None]
    return Problem(problem.weight, moments, target, problem.importance, problem.vectors)


def _fit_scales(grid: GridProblem, damped: Problem, codes: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> None:
    """Moves the scale of each row to the best one for its codes, where all of them stay within their bounds."""
    square = ((codes @ damped.moments) * codes).sum(-1, keepdim=True)
    wanted = (codes * damped.target).sum(-1, keepdim=True)
    found = torch.from_numpy(shortened(torch.where(square > 0, wanted / square, 0.0).numpy()))
    usable = (found >= float(SMALLEST_SCALE)) & (found <= float(LARGEST_SCALE))
    found = torch.where(usable, found, grid.scales)
    lowest, highest = grid.bounds(found)
    usable &= ((codes >= lowest) & (codes <= highest)).all(-1, keepdim=True)
    grid.scales = torch.where(usable, found, grid.scales)
    low.copy_(torch.where(usable, lowest, low))
    high.copy_(torch.where(usable, highest, high))


def _sweep(problem: Problem, codes: torch.Tensor, scales: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> bool:
    """Gives every column in turn its best codes, in place; returns whether any changed."""
    moments, columns = problem.moments, codes.shape[-1]
    # Half the gradient of the error by the values.
    gradient = (codes * scales) @ moments - problem.target
    changed = False
    for start in range(0, columns, _COLUMNS):
        part = slice(start, min(start + _COLUMNS, columns))
        own = moments[:, part, part]
        # Columns first, so that each lies together.
        slope, before, steps, least, most = (
            tensor[..., part].movedim(-1, 0).contiguous() for tensor in (gradient, codes, scales, low, high)
        )
        found = before.clone()
        for j in range(len(found)):
            curvature = own[:, j, j, None] * steps[j]
            best = found[j] - torch.where(curvature > 0, slope[j] / curvature, 0.0)
            best = torch.maximum(torch.minimum(best.round_(), most[j]), least[j])
            change = (best - found[j]) * steps[j]
            slope[j + 1 :].addcmul_(own[:, j, j + 1 :].mT[..., None], change)
            found[j] = best
        change = (found - before).mul_(steps).movedim(0, -1)
        changed |= bool(change.any())
        codes[..., part] = found.movedim(0, -1)
        gradient[..., part.stop :].baddbmm_(change, moments[:, part, part.stop :])
    return changed
