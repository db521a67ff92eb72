"""Which grid a value goes on: as coarse as is good for the strides that follow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dsr_tool.errors import DsrError
from dsr_tool.graph.ir import Node
from dsr_tool.graph.windows import Window
from dsr_tool.runtime.compiler.layouts import Grid
from dsr_tool.runtime.compiler.relayout import taps_of
from dsr_tool.runtime.compiler.constants import Known
from dsr_tool.sparsity.tensor import SparseTensor, Weight

__all__ = ["WINDOWED", "Grids", "shape_of"]

MIN_PLACES = 50
"""Rows and columns of a grid: on a coarser one, more places are no pixels, and kernels read from more planes."""
MAX_COPIES = 1 << 19
"""Work records that a finer value may cost, since each of its phases has its own."""
_MOST_TAPS = 1024
"""Entries of a kernel, each of which takes a step in Python for each phase."""
_MOST_STRIDE, _FARTHEST_TAP = 64, 4096
"""Of a window on a grid: each stride has planes of its own, and each row as many zeros as a window reaches past it."""

WINDOWED = frozenset({"Conv", "MaxPool", "AveragePool"})
_ELEMENTWISE = frozenset(
    {
        "Relu",
        "Clip",
        "Add",
        "Mul",
        "Sub",
        "Div",
        "BatchNormalization",
        "HardSwish",
        "HardSigmoid",
        "Sigmoid",
        "Silu",
        "Elu",
        "LeakyRelu",
        "Tanh",
        "Gelu",
        "Concat",
    }
)


class Grids:
    """The grids of a graph, found by looking ahead.

    Attributes:
        nodes: of the graph, in order.
        known: weights and constants.
        lanes: floats in a vector of the kernels.
        index: the node that is being put down.
    """

    def __init__(self, nodes: Sequence[Node], known: Known, lanes: int) -> None:
        """Begin at the first node."""
        self.nodes, self.known, self.lanes, self.index = nodes, known, lanes, 0
        self._grids: dict[tuple[int, int], list[Grid]] = {}

    def grid_for(self, name: str, height: int, width: int) -> tuple[Grid, int]:
        """The grid for a value, as coarse as is good for what comes after."""
        best = (1, self.survey(name, 1)[0])
        for factor in (2, 4, 8, 16):
            if min(height, width) < factor * MIN_PLACES:
                break
            pad, copies = self.survey(name, factor)
            if copies < 0:
                break
            if copies <= MAX_COPIES:
                best = (factor, pad)
        factor, pad = best
        return self.grid(-(-height // factor), -(-width // factor), pad), factor

    def grid(self, rows: int, columns: int, pad: int) -> Grid:
        """A grid; one that there is already where it has as much padding."""
        known = self._grids.setdefault((rows, columns), [])
        for grid in known:
            if grid.pad >= pad:
                return grid
        known.append(Grid(rows, columns, pad, self.lanes))
        return known[-1]

    def survey(self, name: str, factor: int) -> tuple[int, int]:
        """What a value held with this factor leads to: columns of padding, and work records of kernels.

        The records are -1 where nothing that follows brings the factor down to one.
        """
        finer = {name: factor}
        pad, copies, lowest = 0, 0, factor
        for node in self.nodes[self.index :]:
            source = next((name for name in node.inputs if name in finer), None)
            if source is None:
                continue
            if node.op in _ELEMENTWISE:
                finer[node.outputs[0]] = finer[source]
            elif node.op in WINDOWED and source == node.inputs[0]:
                window = self.window(node)
                if window is None or len(set(window.strides)) != 1 or finer[source] % window.strides[0]:
                    continue
                out = finer[source] // window.strides[0]
                pad = max(pad, *(abs(dx) for _, dx, _ in taps_of(window, finer[source], out)))
                weight = self.known.get(node.inputs[1]) if node.op == "Conv" else None
                if weight is not None and max(window.kernel) > 1:
                    copies += out * out * (weight.mask.active if isinstance(weight, SparseTensor) else weight.size)
                finer[node.outputs[0]] = out
                lowest = min(lowest, out)
        return pad, copies if lowest == 1 else -1

    def window(self, node: Node) -> Window | None:
        """The window of a convolution or pool over two axes."""
        a: Mapping[str, Any] = node.attributes
        kernel = a.get("kernel_shape", ())
        if node.op == "Conv" and not kernel:
            weight = self.known.get(node.inputs[1])
            if weight is None:
                return None
            kernel = shape_of(weight)[2:]
        try:
            window = Window.of(
                kernel, a.get("strides", ()), a.get("pads", ()), a.get("dilations", ()), a.get("auto_pad", "NOTSET")
            )
        except (DsrError, TypeError, ValueError):
            return None
        sizes = (*window.kernel, *window.strides, *window.dilations, *window.begin, *window.end)
        if len(window.kernel) != 2 or not all(isinstance(n, int) for n in sizes):
            return None
        far = max(d * (k - 1) for k, d in zip(window.kernel, window.dilations, strict=True))
        fits = (
            math.prod(window.kernel) <= _MOST_TAPS
            and max(window.strides) <= _MOST_STRIDE
            and max(far, *window.begin, *window.end) <= _FARTHEST_TAP
        )
        return window if fits else None


def shape_of(weight: Weight) -> tuple[int, ...]:
    """Shape of a weight, sparse or not."""
    return weight.mask.shape if isinstance(weight, SparseTensor) else weight.shape
