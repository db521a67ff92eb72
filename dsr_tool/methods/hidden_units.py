"""Hidden units: outputs of one sparse layer that only sparse layers read, found in the captured graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dsr_tool.graph.compact.survey import Product
from dsr_tool.graph.compact.walk import survey_graph
from dsr_tool.graph.fold import fold_norms
from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparse.trace import trace

__all__ = ["Hidden", "hidden_units"]


@dataclass(frozen=True, eq=False)
class Hidden:
    """The hidden units between a layer and those that read it.

    Attributes:
        maker: index of the layer whose rows (first dimension of its weight) compute the units.
        count: number of units.
        readers: index of each layer that reads them, and for each of its columns (second dimension of its weight) the
            unit that it reads, -1 for none of these; int64 of shape (columns,). A flattened channel is read by several
            columns.
    """

    maker: int
    count: int
    readers: tuple[tuple[int, npt.NDArray[np.int64]], ...]


def hidden_units(model: SparseModel, names: Sequence[str]) -> list[Hidden]:
    """Finds the units that can be removed by clearing rows of one layer and columns of others.

    Activation functions, normalisation, pooling and flattening may lie between, and several layers may read the units.
    Skipped are units that anything else uses: operands of sums, depthwise and grouped convolutions, outputs of the
    model, and units that a dense layer or an operator without channels of its own computes or reads.

    Args:
        model: a model with an input shape in its config.
        names: the sparse layers that may change; the index of a layer is its position here.

    Raises:
        UsageError: the model cannot be captured, or the shape of its input is unknown.
    """
    graph, tensors = fold_norms(trace(model.module, model.config.input_shape), model.tensors())
    survey = survey_graph(graph, tensors)
    roots = survey.units.roots()
    pinned = np.zeros(len(roots), np.bool_)
    for units in survey.pinned:
        pinned[roots[units]] = True
    index_of = {name: index for index, name in enumerate(names)}
    found = []
    for product in survey.products:
        units = roots[product.result.units]
        # Rows of one root are removed together, as in a repeated channel; here each unit must be a row of its own.
        if not _is_plain(product, index_of) or pinned[units].any() or len(np.unique(units)) < len(units):
            continue
        others = [other for other in survey.products if other is not product]
        readers = [other for other in survey.products if np.isin(roots[other.source.units], units).any()]
        # Operands of a sum share their units: no row of one can be removed without a row of the other.
        alone = not any(np.isin(roots[other.result.units], units).any() for other in others)
        if alone and readers and all(_is_plain(reader, index_of) for reader in readers):
            columns = [(index_of[reader.weight], _indices(roots[reader.source.units], units)) for reader in readers]
            found.append(Hidden(index_of[product.weight], len(units), tuple(columns)))
    return found


def _is_plain(product: Product, index_of: dict[str, int]) -> bool:
    """Returns whether a product has a sparse weight of shape (outputs, inputs, ...) that is not grouped."""
    return product.weight in index_of and product.groups == 1 and not product.inputs_first


def _indices(wanted: npt.NDArray[np.int64], among: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Returns the index of each wanted number among distinct ones, -1 where it is missing."""
    order = np.argsort(among)
    found = order[np.minimum(np.searchsorted(among[order], wanted), len(among) - 1)]
    return np.where(among[found] == wanted, found, -1)
