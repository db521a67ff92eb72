"""The archive of a sparse model in bytes: its exact size, and the largest weights whose archive is small enough."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

from converters.search import CLOSE, search
from dsr_tool.errors import UsageError
from dsr_tool.files import temporary_folder
from dsr_tool.formats.archive import encode_archive
from dsr_tool.graph.ir import Graph
from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparse.trace import trace
from dsr_tool.sparsity.config import installed_versions
from dsr_tool.sparsity.distribution import by_magnitude, largest
from dsr_tool.sparsity.granularity import Granularity
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor

__all__ = ["archive_bytes", "captured", "largest_within", "smallest_sparsity"]


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


def largest_within(model: SparseModel, limit: int, graph: Graph | None = None) -> dict[str, SparseTensor] | None:
    """Returns the largest weights of a model whose archive has at most `limit` bytes; None if there are none.

    Kernels stay or go as a whole, ranked by their mean magnitudes. With fan-in, the smallest weights of all outputs of
    a layer go together.
    """
    # Captured once for all sizes, since a capture takes a second or more.
    graph, tensors = graph or captured(model.module, model.config.input_shape), model.tensors()
    together = {name: _together(tensors[name], model.granularity) for name in model.masks}
    sizes = {name: np.abs(tensors[name].values)[places].mean(1) for name, places in together.items()}

    def kept(total: int) -> dict[str, SparseTensor]:
        counts = by_magnitude(total, list(sizes.values()))
        chosen = {name: np.sort(largest(size, n)) for (name, size), n in zip(sizes.items(), counts, strict=True)}
        return {name: _part(tensors[name], together[name][rows]) for name, rows in chosen.items()}

    def nbytes(total: int) -> int:
        return _encoded_bytes(model, {**tensors, **kept(total)}, graph)

    if not sizes:
        return None
    most = sum(size.size for size in sizes.values())
    found = search(nbytes, len(sizes), most, most, math.ceil(CLOSE * limit), limit)
    return None if found.below is None else kept(found.below[0])


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
    with temporary_folder() as folder:
        path = folder / "size.dsr"
        encoded.save(path)
        return path.stat().st_size


def _together(tensor: SparseTensor, granularity: Granularity) -> npt.NDArray[np.int64]:
    """Returns the active weights that stay or go together, as indices into the values: one row for each such set."""
    values = tensor.values
    places = np.arange(values.size)
    if granularity.kind != "fan-in":
        return places.reshape(-1, granularity.unit(tensor.mask.shape))
    # Outputs are consecutive and have as many values each; row j of the result is the j-th largest of every output.
    order = np.argsort(-np.abs(values.reshape(tensor.mask.shape[0], -1)), axis=1, kind="stable")
    ranked: npt.NDArray[np.int64] = np.take_along_axis(places.reshape(order.shape), order, axis=1).T
    return ranked


def _part(tensor: SparseTensor, places: npt.NDArray[np.int64]) -> SparseTensor:
    """Returns a tensor with some of its active weights, by their indices among the values."""
    places = np.sort(places, axis=None)
    return SparseTensor(Mask(tensor.mask.shape, tensor.mask.positions[places]), tensor.values[places])
