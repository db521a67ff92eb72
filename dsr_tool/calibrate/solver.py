"""Chooses the active weights of one layer and their values, so that its output changes least.

The error of a layer is a quadratic function of its weights, given by the second moments of its inputs. The mask comes
from ADMM (Boza 2024, arXiv 2401.02938), the values from least squares on the mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsr_tool.sparse.pattern import largest_of_rows

__all__ = ["Problem", "Solution", "largest_mask", "least_squares", "solve", "values"]

_DAMPING = 0.1
"""Share of the mean diagonal that is added to the second moments. MobileNetV2 at .8 from 256 pictures had a KL of 2.28
on 197 others with .04, and of 1.98 with .1; at .7 it was 1.08 and 1.04 on 44 others."""

_FEW = 0.02
"""Further damping per column and input vector, because least squares on few vectors fits their noise: .1 for a
classifier with 1,280 columns and 256 pictures. At 1 it keeps dense weights that no longer fit their inputs: KL 3.2
against 2.5."""

_PENALTIES = (0.1, 0.2, 0.4, 0.7, 1.0)
"""ADMM's penalty rho, from loose to tight. Against a constant 1 with 20 iterations, the error of MobileNetV2's last
projection at density .28 fell from .065 to .054; a constant .3 diverged on another layer."""

_ITERATIONS, _GRADUAL = 10, 40
"""ADMM iterations per penalty, and those in all in which the number of active weights falls to its target."""

_STEPS = 30
"""Steps of conjugate gradients where factorising each row's system would cost more."""

_CHUNK = 1 << 24
"""Most entries of the systems that are factorised together: 64 MiB. Results depend on it by rounding alone."""


@dataclass(frozen=True)
class Problem:
    """The error of a layer as a function of its weights, for groups or parts ("blocks") with their own inputs.

    Attributes:
        weight: the dense weights, shape (blocks, rows, columns).
        moments: second moments E[x x^T] of the inputs, shape (blocks, columns, columns).
        target: E[t x^T] of the wanted outputs, shape (blocks, rows, columns).
        importance: weight of each output's squared error, shape (blocks, rows).
        vectors: number of input vectors behind the moments, shape (blocks,).
        taps: number of weights of a kernel if whole kernels are active together, else 1. The columns are ordered by
            tap, then by channel.
        group: number of consecutive columns that all keep as many weights: M of N:M, or all columns with fan-in; 0 if
            weights may be anywhere.
    """

    weight: torch.Tensor
    moments: torch.Tensor
    target: torch.Tensor
    importance: torch.Tensor
    vectors: torch.Tensor
    taps: int = 1
    group: int = 0

    @property
    def step(self) -> int:
        """Number of which a count of active weights is a multiple."""
        return self.weight.numel() // self.group if self.group else self.taps

    def block(self, number: int) -> Problem:
        """Returns one group or part as a problem of its own."""
        one = slice(number, number + 1)
        return Problem(
            self.weight[one],
            self.moments[one],
            self.target[one],
            self.importance[one],
            self.vectors[one],
            self.taps,
            self.group,
        )

    def error(self, weight: torch.Tensor) -> float:
        """Returns the weighted squared error up to a constant that does not depend on the weights."""
        quadratic = (weight @ self.moments * weight).sum(-1) - 2 * (self.target * weight).sum(-1)
        return float((quadratic * self.importance).sum())


@dataclass(frozen=True)
class Solution:
    """Active weights and values, in the shapes of the problem's weight."""

    mask: torch.Tensor
    weight: torch.Tensor


def solve(problem: Problem, count: int) -> Solution:
    """Returns the mask of exactly `count` weights and the values with the smallest error that was found.

    Args:
        problem: the layer.
        count: active weights of the layer, over all rows; a multiple of `problem.step`.
    """
    normal, scale = _normalised(problem)
    if count >= problem.weight.numel():
        mask = torch.ones_like(problem.weight, dtype=torch.bool)
        return Solution(mask, least_squares(normal, mask) * scale)
    mask = _admm(normal, count)
    weight = least_squares(normal, mask)
    # ADMM promises nothing for a problem that is not convex; the mask by magnitude is its floor.
    plain = largest_mask(problem.weight.square(), count, problem.taps, problem.group)
    other = least_squares(normal, plain)
    if normal.error(other) < normal.error(weight):
        mask, weight = plain, other
    return Solution(mask, weight * scale)


def values(problem: Problem, mask: torch.Tensor) -> torch.Tensor:
    """Returns the values with the smallest error on a mask, damped as those of `solve`."""
    normal, scale = _normalised(problem)
    return least_squares(normal, mask) * scale


def _normalised(problem: Problem) -> tuple[Problem, torch.Tensor]:
    """Returns the problem with damped moments of unit diagonal, and the factor that takes its weights back."""
    diagonal = problem.moments.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True).clamp_min(1e-12)
    columns = problem.weight.shape[-1]
    damping = (_DAMPING + _FEW * columns / problem.vectors.clamp_min(1)[:, None]) * mean
    # Damping pulls towards the dense weights, which are right for inputs that were hardly seen.
    # In place, because a matrix of moments can take 128 MiB.
    moments = problem.moments.clone()
    moments.diagonal(dim1=-2, dim2=-1).add_(damping)
    target = problem.target + problem.weight * damping[:, None]
    scale = (diagonal + damping).rsqrt()[:, None]
    moments.mul_(scale).mul_(scale.mT)
    return (
        Problem(
            problem.weight / scale,
            moments,
            target * scale,
            problem.importance,
            problem.vectors,
            problem.taps,
            problem.group,
        ),
        scale,
    )


def largest_mask(scores: torch.Tensor, count: int, taps: int, group: int = 0) -> torch.Tensor:
    """Returns the mask of the `count` weights with the largest scores; of whole kernels by their sums.

    With a group, it is the nearest mask in which all groups of so many columns have as many weights.
    """
    if group:
        rows = scores.reshape(-1, group)
        return largest_of_rows(rows, count // len(rows)).view(scores.shape)
    if taps > 1:
        scores = scores.unflatten(-1, (taps, -1)).sum(-2)
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask.view(-1)[scores.reshape(-1).topk(count // taps, sorted=False).indices] = True
    return mask.repeat(*[1] * (mask.dim() - 1), taps) if taps > 1 else mask


def _admm(problem: Problem, count: int) -> torch.Tensor:
    """Returns a mask of exactly `count` weights."""
    importance = problem.importance[..., None]
    size = problem.weight.numel()
    sparse, dual = problem.weight, torch.zeros_like(problem.weight)
    mask = torch.ones_like(problem.weight, dtype=torch.bool)
    for level, penalty in enumerate(_PENALTIES):
        inverse = None  # two of them need not be alive together
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(_penalised(problem.moments, penalty)))
        for i in range(level * _ITERATIONS + 1, (level + 1) * _ITERATIONS + 1):
            weight = (problem.target + penalty * (sparse - dual)) @ inverse
            # The cubic schedule of Zhu & Gupta 2017, as in Boza's code.
            share = 1 - min(i / _GRADUAL, 1.0)
            active = count + int((size - count) * share**3) // problem.step * problem.step
            dual = dual + weight
            mask = largest_mask(dual.square() * importance, active, problem.taps, problem.group)
            sparse = dual * mask
            dual = dual - sparse
    return mask


def _penalised(moments: torch.Tensor, penalty: float) -> torch.Tensor:
    """Returns a copy of the moments with a penalty on their diagonal."""
    result = moments.clone()
    result.diagonal(dim1=-2, dim2=-1).add_(penalty)
    return result


def least_squares(problem: Problem, mask: torch.Tensor) -> torch.Tensor:
    """Returns the weights with the smallest error on a mask."""
    if mask.all():
        solved: torch.Tensor = torch.linalg.solve(problem.moments, problem.target.mT)
        return solved.mT
    rows, columns = mask.shape[1:]
    active = mask.sum(-1)
    most = int(active.max())
    if rows * most**3 / 3 > 4 * _STEPS * rows * columns**2:
        return _conjugate_gradients(problem, mask)
    result = torch.zeros_like(problem.weight)
    # The active columns of each row first, filled up with others that are cut off by the identity.
    order = mask.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :most]
    step = max(1, _CHUNK // max(most * most, 1))
    for b in range(len(mask)):
        for start in range(0, rows, step):
            chosen = order[b, start : start + step]
            inside = torch.arange(most) < active[b, start : start + step, None]
            systems = problem.moments[b][chosen[:, :, None], chosen[:, None, :]]
            systems *= inside[:, :, None] & inside[:, None, :]
            systems.diagonal(dim1=-2, dim2=-1).add_((~inside).float())
            right = problem.target[b, start : start + step].gather(-1, chosen) * inside
            factor = torch.linalg.cholesky(systems)
            found = torch.cholesky_solve(right[..., None], factor)[..., 0]
            result[b, start : start + step].scatter_(-1, chosen, found)
    return result * mask


def _conjugate_gradients(problem: Problem, mask: torch.Tensor) -> torch.Tensor:
    """Returns nearly the same as the exact solution: conjugate gradients of all rows at once, kept on the mask."""
    weight = problem.weight * mask
    residual = (problem.target - weight @ problem.moments) * mask
    direction = residual
    square = residual.square().sum(-1, keepdim=True)
    for _ in range(_STEPS):
        image = direction @ problem.moments * mask
        step = square / (direction * image).sum(-1, keepdim=True).clamp_min(1e-30)
        weight = weight + step * direction
        residual = residual - step * image
        new = residual.square().sum(-1, keepdim=True)
        direction = residual + new / square.clamp_min(1e-30) * direction
        square = new
    return weight
