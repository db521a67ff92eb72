"""Budgets in bytes and in multiply-adds: a search for the number of active weights that meets them."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from converters.search import Bracket, search
from dsr_tool.errors import CheckFailed, UsageError
from dsr_tool.files import writing
from dsr_tool.formats.archive import encode_archive
from dsr_tool.graph.ir import Graph
from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparse.sparsify import Sparsifier
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
    "archive_bytes",
    "fit",
    "solve",
    "trim",
    "smallest_sparsity",
]

LEAST_BYTES = 0.98
"""Smallest fraction of a budget in bytes that an archive takes, if the model is large enough."""
MARGIN = 0.019
"""Fraction of a budget in bytes that stays free before a training, since trained values compress less well.

Archives grew by 0.0 to 1.7 % in static and dsr trainings of ResNets and MobileNets, by 2.4 % with ShuffleNet, and
shrank if many grown weights stayed zero; see `docs/decisions/0006-budgets-in-bytes.md`.
"""
LEAST_MACS = 0.99
"""Smallest fraction of a budget in multiply-adds that a model takes."""
_CLOSE = 0.999
"""Fraction of a limit at which a search stops if its sizes are cheap."""
_BYTES_PER_WEIGHT = 4
"""Bytes per active weight of an archive, for the first guess of a search."""
_RECORD = 32
"""Bytes by which an archive may grow with the digits of the budget that is recorded in it."""


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


def fit(sparsifier: Sparsifier, budget: Budget) -> Fitted:
    """Makes a model sparse so that it meets a budget of any kind; see `solve`.

    Args:
        sparsifier: the model with the options of its conversion; applied here.
        budget: the budget.

    Raises:
        UsageError: the budget is out of the model's reach, its multiply-adds are unknown, or it cannot be captured.
    """
    total, nbytes = solve(sparsifier, budget)
    return Fitted(sparsifier.apply(total, budget), budget, nbytes)


def solve(sparsifier: Sparsifier, budget: Budget) -> tuple[int, int | None]:
    """Returns the number of active weights that meets a budget, and the bytes of the archive if it is in bytes.

    Sparsity and parameters are met exactly. An archive has at most the bytes of its budget, less a margin for its
    growth in training, and multiply-adds are at most those allowed. Both are at least `LEAST_BYTES` and `LEAST_MACS` of
    the budget, or as close to it as whole weights allow.

    Args:
        sparsifier: the model with the options of its conversion; not changed.
        budget: the budget.

    Raises:
        UsageError: the budget is out of the model's reach, its multiply-adds are unknown, or it cannot be captured.
    """
    if budget.kind == "bytes":
        return _solve_bytes(sparsifier, budget)
    if budget.kind == "macs":
        return _solve_macs(sparsifier, budget), None
    return sparsifier.active_weights(budget), None


def archive_bytes(model: SparseModel, graph: Graph | None = None) -> int:
    """Returns the exact size in bytes of the archive that a model exports to: smallest encodings, fp32 values.

    Args:
        model: the model; its weights outside the masks do not matter.
        graph: its graph; captured here when absent.

    Raises:
        UsageError: the model cannot be captured, or not all of its parameters are float32.
    """
    return _encoded_bytes(model, model.tensors(), graph or _graph(model.module, model.config.input_shape))


def smallest_sparsity(model: SparseModel, limit: int) -> float | None:
    """Returns the smallest sparsity at which the archive of a model has at most `limit` bytes.

    It is estimated by pruning the smallest weights of the whole network, with the values that the model has now.

    Returns:
        Fraction of zeros among the prunable weights, rounded up to four digits; None if no sparsity is enough.
    """
    kept = _largest_within(model, limit)
    if kept is None:
        return None
    # Rounded up, so that the rounded sparsity still fits.
    return math.ceil((1 - sum(tensor.values.size for tensor in kept.values()) / model.prunable_weights) * 1e4) / 1e4


def trim(model: SparseModel, limit: int) -> int:
    """Prunes the smallest weights of a model until its archive has at most `limit` bytes, usually none.

    Returns:
        The bytes of the archive.

    Raises:
        CheckFailed: no number of weights is small enough.
    """
    if (nbytes := archive_bytes(model)) <= limit:
        return nbytes
    kept = _largest_within(model, limit)
    if kept is None:
        raise CheckFailed(f"the archive takes {nbytes:,} bytes, and the budget is {limit:,}; give a larger budget.")
    for name, tensor in kept.items():
        model.masks[name].copy_(torch.from_numpy(tensor.mask.to_bool()))
    model.apply_masks()
    return archive_bytes(model)


def _largest_within(model: SparseModel, limit: int) -> dict[str, SparseTensor] | None:
    """Returns the largest weights of a model whose archive has at most `limit` bytes; None if there are none."""
    # Captured once for all sizes, since a capture takes a second or more.
    graph, tensors = _graph(model.module, model.config.input_shape), model.tensors()
    sparse = {name: tensors[name] for name in model.masks}

    def kept(total: int) -> dict[str, SparseTensor]:
        counts = by_magnitude(total, [tensor.values for tensor in sparse.values()])
        return {name: _largest_of(sparse[name], count) for name, count in zip(sparse, counts, strict=True)}

    most = model.active_weights
    found = (
        search(
            lambda total: _encoded_bytes(model, {**tensors, **kept(total)}, graph),
            len(sparse),
            most,
            most,
            math.ceil(_CLOSE * limit),
            limit,
        )
        if sparse
        else None
    )
    return None if found is None or found.below is None else kept(found.below[0])


def _solve_bytes(sparsifier: Sparsifier, budget: Budget) -> tuple[int, int]:
    graph = _graph(sparsifier.module, sparsifier.config.input_shape)

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
    found = search(macs, least, most, guess, math.ceil(_CLOSE * limit), limit)
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


def _graph(module: torch.nn.Module, input_shape: tuple[int, ...]) -> Graph:
    other = next((p.dtype for p in module.parameters() if p.dtype != torch.float32), None)
    if other is not None:
        raise UsageError(
            f"a budget in bytes needs float32 weights, and this model has {other}; call model.to(torch.float32) first."
        )
    return trace(module, input_shape)


def _encoded_bytes(model: SparseModel, tensors: dict[str, SparseTensor], graph: Graph) -> int:
    """Returns the size of the archive, written to a temporary folder."""
    # Written, not estimated: a budget in bytes must hold to the byte, with all headers and alignment.
    encoded = encode_archive(tensors, model.specs, graph, model.config, versions=installed_versions())
    with tempfile.TemporaryDirectory() as folder, writing(Path(folder)):
        path = Path(folder) / "size.dsr"
        encoded.save(path)
        return path.stat().st_size


def _largest_of(tensor: SparseTensor, count: int) -> SparseTensor:
    """Returns a tensor with only its `count` largest values."""
    kept = np.sort(largest(np.abs(tensor.values), count))
    return SparseTensor(Mask(tensor.mask.shape, tensor.mask.positions[kept]), tensor.values[kept])
