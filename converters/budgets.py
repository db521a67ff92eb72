"""Budgets in bytes and in multiply-adds: which number of active weights meets them, found by trying."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dsr_tool.errors import UsageError
from dsr_tool.files import writing
from dsr_tool.formats.archive import encode_archive
from dsr_tool.graph.ir import Graph
from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparse.sparsify import Plan
from dsr_tool.sparse.trace import trace
from dsr_tool.sparsity.budget import Budget
from dsr_tool.sparsity.config import installed_versions
from dsr_tool.sparsity.distribution import by_magnitude, largest
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor

__all__ = [
    "LEAST_BYTES",
    "LEAST_MACS",
    "MARGIN",
    "Fitted",
    "Found",
    "archive_bytes",
    "fit",
    "search",
    "smallest_sparsity",
]

LEAST_BYTES = 0.98
"""An archive takes at least this part of a budget in bytes, where the model is large enough."""
MARGIN = 0.019
"""Part of a budget in bytes that stays free at the start, since values compress less well once they are trained.

Archives grew by 0.0 to 1.7 % in static and dsr trainings of ResNets and MobileNets, by 2.4 % with ShuffleNet, and
shrank where many grown weights stayed zero; see `docs/decisions/0006-budgets-in-bytes.md`.
"""
LEAST_MACS = 0.99
"""Multiply-adds come to at least this part of their budget."""
_CLOSE = 0.999
_BYTES_PER_WEIGHT = 4  # as a first guess
_RECORD = 32  # bytes by which an archive may grow with the digits of the budget that is noted in it


@dataclass(frozen=True)
class Fitted:
    """A model that meets its budget.

    Attributes:
        model: the sparse model.
        budget: what was asked.
        archive_bytes: size of the archive that it exports to; None unless the budget is in bytes.
    """

    model: SparseModel
    budget: Budget
    archive_bytes: int | None = None


def fit(plan: Plan, budget: Budget) -> Fitted:
    """Make a planned model sparse so that it meets a budget of any kind.

    Sparsity and parameters are met exactly. An archive has at most the bytes of its budget, less a margin for what
    training does to it, and multiply-adds are at most those allowed; both as near below as `LEAST_BYTES` and
    `LEAST_MACS` say, or as near as one weight more or less lets them be.

    Raises:
        UsageError: the budget is out of the model's reach, its multiply-adds are unknown, or it cannot be captured.
    """
    if budget.kind == "bytes":
        return _fit_bytes(plan, budget)
    total = _solve_macs(plan, budget) if budget.kind == "macs" else plan.exact(budget)
    return Fitted(plan.finish(total, budget), budget)


def archive_bytes(model: SparseModel, graph: Graph | None = None) -> int:
    """Exact size of the archive that a model exports to, smallest encodings and fp32 values.

    Args:
        model: the model; its weights outside the masks do not matter.
        graph: its graph, where it was captured already.

    Raises:
        UsageError: it cannot be captured, or not all of its parameters are float32.
    """
    return _encoded_bytes(model, model.tensors(), graph or _graph(model.module, model.config.input_shape))


def smallest_sparsity(model: SparseModel, limit: int) -> float | None:
    """The smallest sparsity at which the archive of a model has at most `limit` bytes.

    Found by leaving out the smallest weights of the whole network, those that the model has now.

    Returns:
        Fraction of zeros among the prunable weights, rounded up to four digits; None where none is small enough.
    """
    graph, tensors = _graph(model.module, model.config.input_shape), model.tensors()
    sparse = {name: tensors[name] for name in model.masks}

    def size(total: int) -> int:
        counts = by_magnitude(total, [tensor.values for tensor in sparse.values()])
        kept = {name: _largest_of(sparse[name], count) for name, count in zip(sparse, counts, strict=True)}
        return _encoded_bytes(model, {**tensors, **kept}, graph)

    most = model.active_weights
    found = search(size, len(sparse), most, most, math.ceil(_CLOSE * limit), limit) if sparse else None
    if found is None or found.below is None:
        return None
    return math.ceil((1 - found.below[0] / model.prunable_weights) * 1e4) / 1e4


def _fit_bytes(plan: Plan, budget: Budget) -> Fitted:
    graph = _graph(plan.module, plan.config.input_shape)

    def size(total: int) -> int:
        return archive_bytes(plan.tried(total, budget), graph)

    limit, enough = budget.amount, math.ceil(LEAST_BYTES * budget.amount)
    guess = limit // _BYTES_PER_WEIGHT
    found = search(size, plan.least, plan.prunable, guess, enough, math.floor(limit * (1 - MARGIN)))
    total, nbytes = _nearest(found, size, budget, enough, plan.least, plan.prunable)
    return Fitted(plan.finish(total, budget), budget, nbytes)


def _solve_macs(plan: Plan, budget: Budget) -> int:
    """The number of active weights whose multiply-adds come nearest to the budget from below."""
    specs = [spec for spec in plan.specs.values() if spec.macs_per_weight]
    if not specs:
        raise UsageError(
            f"budget {budget.show()} cannot be met, since this model's multiply-adds are unknown; give an input shape, "
            f"and a network with convolutions or linear layers."
        )

    def macs(total: int) -> int:
        counts = plan.counts(total)
        return sum(round(counts.get(spec.name, spec.size) * spec.macs_per_weight) for spec in specs)

    limit, least, most = budget.amount, plan.least, plan.prunable
    guess = round(most * limit / max(macs(most), 1))
    found = search(macs, least, most, guess, math.ceil(_CLOSE * limit), limit)
    return _nearest(found, macs, budget, math.ceil(LEAST_MACS * limit), least, most)[0]


@dataclass
class Found:
    """The two numbers that a search ended between, each with its size; None where there is none."""

    below: tuple[int, int] | None
    above: tuple[int, int] | None


def search(size: Callable[[int], int], least: int, most: int, guess: int, enough: int, limit: int) -> Found:
    """Look for a number in [least, most] with `enough` <= size <= `limit`, where sizes rise with numbers.

    Sizes are costly, so the next number to try is where a line through the two nearest sizes meets the middle of what
    is wanted; every third time it is half-way between them, so that a bent curve cannot hold the search up. What is
    found below never exceeds the limit, however sizes waver.
    """
    below, above = (least, size(least)), None
    if below[1] > limit:
        return Found(None, below)
    start, aim, tries = below, (enough + limit) // 2, 0
    while below[1] < enough and below[0] < (most if above is None else above[0] - 1):
        number = min(max(guess, below[0] + 1), most if above is None else above[0] - 1)
        tried = (number, size(number))
        if tried[1] > limit:
            above = tried
        else:
            below = tried
        tries += 1
        if above is not None and tries % 3 == 0:
            guess = (below[0] + above[0]) // 2
        else:
            guess = _on_line(*((start, below) if above is None else (below, above)), aim)
    return Found(below, above)


def _on_line(one: tuple[int, int], other: tuple[int, int], size: int) -> int:
    """The number at which a line through two points has a size; far away where the line does not rise."""
    rise = other[1] - one[1]
    return one[0] + (other[0] - one[0]) * (size - one[1]) // rise if rise > 0 else 2 * other[0]


def _nearest(
    found: Found, size: Callable[[int], int], budget: Budget, enough: int, least: int, most: int
) -> tuple[int, int]:
    """The number to take and its size: below the limit of the search or, where that is too little, of the budget."""
    points = [point for point in (found.below, found.above) if point is not None and point[1] <= budget.amount]
    if not points:
        raise budget.out_of_reach(size(least) + _RECORD * (budget.kind == "bytes"), size(most))
    chosen = points[0]
    if chosen[1] < enough:
        chosen = points[-1]
    if chosen[1] < enough and chosen[0] == most:
        raise budget.out_of_reach(size(least) + _RECORD * (budget.kind == "bytes"), chosen[1])
    return chosen


def _graph(module: torch.nn.Module, input_shape: tuple[int, ...]) -> Graph:
    other = next((p.dtype for p in module.parameters() if p.dtype != torch.float32), None)
    if other is not None:
        raise UsageError(
            f"weights of {other} have no archive, which the budget is of; call model.to(torch.float32) first."
        )
    return trace(module, input_shape)


def _encoded_bytes(model: SparseModel, tensors: dict[str, SparseTensor], graph: Graph) -> int:
    """Size of the file, as its writer makes it."""
    encoded = encode_archive(tensors, model.specs, graph, model.config, versions=installed_versions())
    with tempfile.TemporaryDirectory() as folder, writing(Path(folder)):
        path = Path(folder) / "size.dsr"
        encoded.save(path)
        return path.stat().st_size


def _largest_of(tensor: SparseTensor, count: int) -> SparseTensor:
    """A tensor with its largest values alone."""
    kept = np.sort(largest(np.abs(tensor.values), count))
    return SparseTensor(Mask(tensor.mask.shape, tensor.mask.positions[kept]), tensor.values[kept])
