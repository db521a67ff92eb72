"""Budgets in bytes and in multiply-adds: a search for the number of active weights that meets them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from converters.archive_size import archive_bytes, captured, largest_within
from converters.search import CLOSE, Bracket, search
from dsr_tool.errors import CheckFailed, UsageError
from dsr_tool.graph.ir import Graph
from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparse.sparsify import Sparsifier
from dsr_tool.sparsity.budget import Budget

__all__ = ["LEAST_BYTES", "LEAST_MACS", "MARGIN", "Fitted", "solve", "trim"]

LEAST_BYTES = 0.98
"""Smallest fraction of a budget in bytes that an archive takes, if the model is large enough."""
MARGIN = 0.019
"""Fraction of a budget in bytes that stays free before a training, since trained values compress less well.

Archives grew by 0.0 to 1.7 % in static and dsr trainings of ResNets and MobileNets, by 2.4 % with ShuffleNet, and
shrank if many grown weights stayed zero; see `docs/decisions/0006-budgets-in-bytes.md`.
"""
LEAST_MACS = 0.99
"""Smallest fraction of a budget in multiply-adds that a model takes."""
_BYTES_PER_WEIGHT = 4
"""Bytes per active weight of an archive, for the first guess of a search."""
_RECORD = 32
"""Bytes by which an archive may grow with the digits of the numbers that are recorded in it."""


@dataclass(frozen=True)
class Fitted:
    """A model that meets its budget.

    Attributes:
        model: the sparse model.
        budget: the budget that was asked for.
        archive_bytes: size of the archive that it exports to; None unless the budget is in bytes.
        notes: sentences on what the conversion decided by itself, such as which part of a checkpoint it read.
        warnings: sentences on what the user should look at, such as layers that keep very few weights.
    """

    model: SparseModel
    budget: Budget
    archive_bytes: int | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def solve(sparsifier: Sparsifier, budget: Budget, graph: Graph | None = None) -> tuple[int, int | None]:
    """Returns the number of active weights that meets a budget, and the bytes of the archive if it is in bytes.

    Sparsity and parameters are met exactly. An archive has at most the bytes of its budget, less a margin for its
    growth in training, and multiply-adds are at most those allowed. Both are at least `LEAST_BYTES` and `LEAST_MACS` of
    the budget, or as close to it as whole weights allow.

    Args:
        sparsifier: the model with the options of its conversion; not changed.
        budget: the budget.
        graph: the graph of the model, for a budget in bytes; captured here when absent.

    Raises:
        UsageError: the budget is out of the model's reach, its multiply-adds are unknown, or it cannot be captured.
    """
    if budget.kind == "bytes":
        graph = graph or captured(sparsifier.module, sparsifier.config.input_shape)
        return _solve_bytes(sparsifier, budget, graph)
    if budget.kind == "macs":
        return _solve_macs(sparsifier, budget), None
    return sparsifier.active_weights(budget), None


def trim(model: SparseModel, limit: int, graph: Graph | None = None) -> int:
    """Prunes the smallest weights or kernels of a model until its archive has at most `limit` bytes, usually none.

    Args:
        model: the model, changed in place.
        limit: bytes that are allowed.
        graph: its graph; captured here when absent.

    Returns:
        The bytes of the archive.

    Raises:
        CheckFailed: no number of weights is small enough.
    """
    graph = graph or captured(model.module, model.config.input_shape)
    if (nbytes := archive_bytes(model, graph)) <= limit:
        return nbytes
    kept = largest_within(model, limit - _RECORD, graph)
    if kept is None:
        raise CheckFailed(f"the archive takes {nbytes:,} bytes, and the budget is {limit:,}; give a larger budget.")
    for name, tensor in kept.items():
        model.masks[name].copy_(torch.from_numpy(tensor.mask.to_bool()))
    model.apply_masks()
    record = {**model.config.conversion, "active_weights": model.active_weights}
    model.config = replace(model.config, conversion=record)
    return archive_bytes(model, graph)


def _solve_bytes(sparsifier: Sparsifier, budget: Budget, graph: Graph) -> tuple[int, int]:
    def size(total: int) -> int:
        return archive_bytes(sparsifier.preview(total, budget), graph)

    # The search aims below the limit by the margin; `_nearest` allows the whole limit if that leaves too little.
    limit, enough = budget.amount, math.ceil(LEAST_BYTES * budget.amount)
    guess = limit // _BYTES_PER_WEIGHT
    found = search(size, sparsifier.least, sparsifier.prunable, guess, enough, math.floor(limit * (1 - MARGIN)))
    return _nearest(found, size, budget, enough, sparsifier.least, sparsifier.prunable)


def _solve_macs(sparsifier: Sparsifier, budget: Budget) -> int:
    """Returns the number of active weights whose multiply-adds are nearest to the budget from below."""
    specs = [spec for spec in sparsifier.specs.values() if spec.macs_per_weight]
    if not specs:
        raise UsageError(
            f"budget {budget.show()} cannot be met, since this model's multiply-adds are unknown; give an input shape, "
            f"and a network with convolutions or linear layers."
        )

    def macs(total: int) -> int:
        counts = sparsifier.counts(total)
        # Dense layers count in full.
        return sum(round(counts.get(spec.name, spec.size) * spec.macs_per_weight) for spec in specs)

    limit, least, most = budget.amount, sparsifier.least, sparsifier.prunable
    guess = round(most * limit / max(macs(most), 1))
    found = search(macs, least, most, guess, math.ceil(CLOSE * limit), limit)
    return _nearest(found, macs, budget, math.ceil(LEAST_MACS * limit), least, most)[0]


def _nearest(
    found: Bracket, size: Callable[[int], int], budget: Budget, enough: int, least: int, most: int
) -> tuple[int, int]:
    """Returns the chosen number and its size: below the limit of the search or, if that is too little, of the budget.

    Raises:
        UsageError: no number meets the budget.
    """
    # The search of a budget in bytes has a lower limit than the budget, so `above` may fit the budget as well.
    points = [point for point in (found.below, found.above) if point is not None and point[1] <= budget.amount]
    if not points:
        raise budget.out_of_reach(size(least) + _RECORD * (budget.kind == "bytes"), size(most))
    chosen = points[0]
    if chosen[1] < enough:
        chosen = points[-1]
    # Even the whole model takes less: the budget is larger than it can be.
    if chosen[1] < enough and chosen[0] == most:
        raise budget.out_of_reach(size(least) + _RECORD * (budget.kind == "bytes"), chosen[1])
    return chosen
