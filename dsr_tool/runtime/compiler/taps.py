"""Windows in the strip layout: for each entry of a kernel, how far its input lies from the output."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

from dsr_tool.errors import DsrError
from dsr_tool.graph.ir import Node
from dsr_tool.graph.windows import Window
from dsr_tool.runtime.compiler.constants import Constants, shape_of
from dsr_tool.runtime.compiler.layouts import Planes

__all__ = ["POINT", "Tap", "extend_halo", "offsets_of", "taps_of", "window_of"]

Tap = tuple[int, int, int]
"""Rows and columns of the grid from an output to an input, and the input's phase."""

POINT = Window((1, 1), (1, 1), (1, 1), (0, 0), (0, 0))
"""The window of a 1 x 1 kernel."""

_MAX_KERNEL = 1024
"""Largest number of kernel entries: each takes a step in Python for every output phase."""
_MAX_STRIDE = 64
"""Largest stride: an input of a strided window has stride x stride planes per channel."""
_MAX_REACH = 4096
"""Farthest tap and widest padding, in pixels: each row of a grid has as many zeros as a window reaches past it."""


def window_of(node: Node, constants: Constants) -> Window | None:
    """Returns the window of a convolution or pool over two axes, or None if the kernels do not support it."""

    def sizes(name: str) -> tuple[int, ...]:
        # Attributes come from a file and may have any type; Window.of and the check below refuse others.
        return cast("tuple[int, ...]", node.attributes.get(name, ()))

    kernel = sizes("kernel_shape")
    if node.op == "Conv" and not kernel:
        weight = constants.get(node.inputs[1])
        if weight is None:
            return None
        kernel = shape_of(weight)[2:]
    auto_pad = str(node.attributes.get("auto_pad", "NOTSET"))
    try:
        window = Window.of(kernel, sizes("strides"), sizes("pads"), sizes("dilations"), auto_pad)
    except (DsrError, TypeError, ValueError):
        return None  # the reference says what is wrong with these attributes
    numbers = (*window.kernel, *window.strides, *window.dilations, *window.begin, *window.end)
    # Floats pass through Window.of, but would end as wrong offsets here.
    if len(window.kernel) != 2 or not all(isinstance(number, int) for number in numbers):
        return None
    farthest = max(d * (k - 1) for k, d in zip(window.kernel, window.dilations, strict=True))
    supported = (
        math.prod(window.kernel) <= _MAX_KERNEL
        and max(window.strides) <= _MAX_STRIDE
        and max(farthest, *window.begin, *window.end) <= _MAX_REACH
    )
    return window if supported else None


def taps_of(window: Window, fine_in: int, fine_out: int) -> list[Tap]:
    """Returns the tap of every output phase and kernel entry, phases outermost.

    Args:
        window: the window.
        fine_in: factor of the input.
        fine_out: factor of the output.
    """
    taps = []
    for a in range(fine_out):
        for b in range(fine_out):
            for i in range(window.kernel[0]):
                for j in range(window.kernel[1]):
                    y = a * window.strides[0] + i * window.dilations[0] - window.begin[0]
                    x = b * window.strides[1] + j * window.dilations[1] - window.begin[1]
                    # Rounded down, so taps before the first pixel have negative rows and columns, and a phase >= 0.
                    taps.append((y // fine_in, x // fine_in, y % fine_in * fine_in + x % fine_in))
    return taps


def offsets_of(window: Window, source: Planes, out: Planes) -> list[tuple[int, ...]]:
    """Returns the vectors from an output to its inputs, one tuple for each output phase."""
    pitch, stride = source.grid.pitch, source.stride
    offsets = [phase * stride + dy * pitch + dx for dy, dx, phase in taps_of(window, source.factor, out.factor)]
    entries = math.prod(window.kernel)
    return [tuple(offsets[i : i + entries]) for i in range(0, len(offsets), entries)]


def extend_halo(source: Planes, taps: Sequence[Tap]) -> bool:
    """Makes the halo of a value wide enough for these taps. Returns False if that is out of range."""
    steps = [dy * source.grid.pitch + dx for dy, dx, _ in taps]
    return source.extend_halo(max(0, -min(steps)), max(0, *steps))
