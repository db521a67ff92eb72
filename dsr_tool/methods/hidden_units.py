"""Hidden units: outputs of one sparse layer that nothing but sparse layers reads, as the captured graph says."""

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
        maker: number of the layer whose rows (first dimension of its weight) make the units.
        count: how many units there are.
        readers: number of each layer that reads them, and for each of its columns (second dimension of its weight)
            which unit it reads; -1 for none of these. A flattened channel is read by several columns.
    """

    maker: int
    count: int
    readers: tuple[tuple[int, npt.NDArray[np.int64]], ...]


def hidden_units(model: SparseModel, names: Sequence[str]) -> list[Hidden]:
    """Find the units that can be removed by clearing rows of one layer and columns of others.

    Activation functions, normalisation, pooling and flattening may lie between, and several layers may read the units.
    Left out is whatever has a share in more: operands of sums, depthwise and grouped convolutions, outputs of
    the model, and units that a dense layer or any operator without channels of its own makes or reads.

    Args:
        model: with the shape of its input in its description.
        names: the sparse layers that may change; their places in it are their numbers.

    Raises:
        UsageError: the model cannot be captured, or the shape of its input is unknown.
    """
    graph, tensors = fold_norms(trace(model.module, model.config.input_shape), model.tensors())
    survey = survey_graph(graph, tensors)
    roots = survey.units.roots()
    pinned = np.zeros(len(roots), np.bool_)
    for units in survey.pinned:
        pinned[roots[units]] = True
    number = {name: index for index, name in enumerate(names)}
    found = []
    for product in survey.products:
        units = roots[product.result.units]
        if not _plain(product, number) or pinned[units].any() or len(np.unique(units)) < len(units):
            continue
        others = [other for other in survey.products if other is not product]
        readers = [other for other in survey.products if np.isin(roots[other.source.units], units).any()]
        alone = not any(np.isin(roots[other.result.units], units).any() for other in others)
        if alone and readers and all(_plain(reader, number) for reader in readers):
            columns = [(number[reader.weight], _positions(roots[reader.source.units], units)) for reader in readers]
            found.append(Hidden(number[product.weight], len(units), tuple(columns)))
    return found


def _plain(product: Product, number: dict[str, int]) -> bool:
    return product.weight in number and product.groups == 1 and not product.inputs_first


def _positions(wanted: npt.NDArray[np.int64], among: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The place of each number in a list of distinct ones, -1 where it is not in it."""
    order = np.argsort(among)
    places = order[np.minimum(np.searchsorted(among[order], wanted), len(among) - 1)]
    return np.where(among[places] == wanted, places, -1)
