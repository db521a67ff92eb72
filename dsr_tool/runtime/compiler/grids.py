"""The grid of a value, found by looking ahead: as coarse as is good for the strides that follow."""

from __future__ import annotations

from collections.abc import Container, Sequence

from dsr_tool.graph.ir import Node
from dsr_tool.graph.operators import operator_of
from dsr_tool.runtime.compiler.constants import Constants
from dsr_tool.runtime.compiler.layouts import Grid
from dsr_tool.runtime.compiler.taps import taps_of, window_of
from dsr_tool.sparsity.tensor import SparseTensor

__all__ = ["Grids"]

MIN_GRID = 50
"""Fewest rows and columns of a grid that is coarser than its pixels: on a smaller one, more positions are padding, and
kernels read from more planes."""
MAX_COPIES = 1 << 19
"""Work records that a coarser grid may cost in a network: each phase of an output has records of its own."""
FACTORS = (2, 4, 8, 16)
"""Factors that are tried, from the finest grid on."""


class Grids:
    """The grids of a graph."""

    def __init__(self, nodes: Sequence[Node], constants: Constants, lowered: Container[str], lanes: int) -> None:
        """Begins without grids.

        Args:
            nodes: the nodes of the graph, in order.
            constants: known values.
            lowered: operators that have a lowering rule; the layout of a value is lost at others.
            lanes: floats in a vector of the kernels.
        """
        self._nodes, self._constants, self._lowered, self._lanes = nodes, constants, lowered, lanes
        self._grids: dict[tuple[int, int], list[Grid]] = {}

    def choose(self, name: str, height: int, width: int, index: int) -> tuple[Grid, int]:
        """Returns the grid for a value that nodes from `index` on read, and the value's factor on it."""
        best = (1, self.survey(name, 1, index)[0])
        for factor in FACTORS:
            if min(height, width) < factor * MIN_GRID:
                break  # larger factors make the grid smaller still
            pad, copies = self.survey(name, factor, index)
            if copies is None:
                break  # no strides follow that bring this factor down, nor any larger one
            if copies <= MAX_COPIES:
                best = (factor, pad)
        factor, pad = best
        return self.grid(-(-height // factor), -(-width // factor), pad), factor

    def grid(self, rows: int, columns: int, pad: int) -> Grid:
        """Returns a grid of this size; an existing one with as much padding if possible, so that values share it."""
        grids = self._grids.setdefault((rows, columns), [])
        # Values on one grid can be added without a relayout, which is worth some columns of padding.
        for grid in grids:
            if grid.pad >= pad:
                return grid
        grids.append(Grid(rows, columns, pad, self._lanes))
        return grids[-1]

    def survey(self, name: str, factor: int, index: int) -> tuple[int, int | None]:
        """Follows a value of this factor through the nodes that keep its grid.

        Args:
            name: the value.
            factor: its factor.
            index: the first node that may read it.

        Returns:
            Columns of padding that windows need, and the work records of convolutions on phases; None for the records
            if no strides bring the factor down to 1.
        """
        factors = {name: factor}
        pad, copies, lowest = 0, 0, factor
        for node in self._nodes[index:]:
            source = next((name for name in node.inputs if name in factors), None)
            row = operator_of(node.op)
            if source is None or node.op not in self._lowered:
                continue
            if row.elementwise or (node.op == "Concat" and node.attributes.get("axis") == 1):
                # The result lies on the grid of its input, so the strides after it count for the input too.
                factors[node.outputs[0]] = factors[source]
            elif row.windowed and source == node.inputs[0]:
                window = window_of(node, self._constants)
                if window is None or len(set(window.strides)) != 1 or factors[source] % window.strides[0]:
                    continue
                out = factors[source] // window.strides[0]
                pad = max(pad, *(abs(dx) for _, dx, _ in taps_of(window, factors[source], out)))
                # The phases of a 1 x 1 kernel differ by a shift alone, so they share their records.
                if max(window.kernel) > 1:
                    copies += out * out * self._records(node)
                factors[node.outputs[0]] = out
                lowest = min(lowest, out)
        return pad, copies if lowest == 1 else None

    def _records(self, node: Node) -> int:
        """Returns the active weights of a node."""
        weights = [self._constants.get(node.inputs[i]) for i in operator_of(node.op).weights if i < len(node.inputs)]
        return sum(
            weight.mask.active if isinstance(weight, SparseTensor) else weight.size
            for weight in weights
            if weight is not None
        )
