"""The archive of a sparse model in bytes: its exact size, and the largest weights whose archive is small enough."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import numpy as np
import torch

from converters.search import search
from dsr_tool.errors import UsageError
from dsr_tool.files import writing
from dsr_tool.formats.archive import encode_archive
from dsr_tool.graph.ir import Graph
from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparse.trace import trace
from dsr_tool.sparsity.config import installed_versions
from dsr_tool.sparsity.distribution import by_magnitude, largest
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor

__all__ = ["archive_bytes", "captured", "largest_within", "smallest_sparsity"]

_CLOSE = 0.999
"""Fraction of a limit at which the search for the largest weights stops."""


def archive_bytes(model: SparseModel, graph: Graph | None = None) -> int:
    """Returns the exact size in bytes of the archive that a model exports to: smallest encodings, fp32 values.

    Args:
        model: the model; its weights outside the masks do not matter.
        graph: its graph; captured here when absent.

    Raises:
        UsageError: the model cannot be captured, or not all of its parameters are float32.
    """
    return _encoded_bytes(model, model.tensors(), graph or captured(model.module, model.config.input_shape))


def smallest_sparsity(model: SparseModel, limit: int) -> float | None:
    """Returns the smallest sparsity at which the archive of a model has at most `limit` bytes.

    It is estimated by pruning the smallest weights of the whole network, with the values that the model has now.

    Returns:
        Fraction of zeros among the prunable weights, rounded up to four digits; None if no sparsity is enough.
    """
    kept = largest_within(model, limit)
    if kept is None:
        return None
    # Rounded up, so that the rounded sparsity still fits.
    return math.ceil((1 - sum(tensor.values.size for tensor in kept.values()) / model.prunable_weights) * 1e4) / 1e4


def largest_within(model: SparseModel, limit: int) -> dict[str, SparseTensor] | None:
    """Returns the largest weights of a model whose archive has at most `limit` bytes; None if there are none."""
    # Captured once for all sizes, since a capture takes a second or more.
    graph, tensors = captured(model.module, model.config.input_shape), model.tensors()
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


def captured(module: torch.nn.Module, input_shape: tuple[int, ...]) -> Graph:
    """Returns the graph of a model whose archive is to be measured.

    Raises:
        UsageError: the model cannot be captured, or not all of its parameters are float32.
    """
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
