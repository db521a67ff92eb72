"""How values move between layouts, and where the entries of a kernel lie on a grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from dsr_tool.graph.windows import Window
from dsr_tool.runtime.compiler.layouts import Flat, Planes, Rows, Value
from dsr_tool.runtime.compiler.segment import Op, address
from dsr_tool.runtime.kernels.ops import Kind, Operation
from dsr_tool.sparsity.tensor import Array

__all__ = ["copied", "loaded", "offsets_of", "reach", "regridded", "rowwise", "taps_of"]

_MOST_PLACES = 1 << 14
"""Of a plane, for the kernel that moves whole vectors; as in kernels/regrid.cpp."""


def taps_of(window: Window, fine_in: int, fine_out: int) -> list[tuple[int, int, int]]:
    """For each output phase and kernel entry: rows and columns of the grid to go, and the input's phase."""
    result = []
    for a in range(fine_out):
        for b in range(fine_out):
            for i in range(window.kernel[0]):
                for j in range(window.kernel[1]):
                    y = a * window.strides[0] + i * window.dilations[0] - window.begin[0]
                    x = b * window.strides[1] + j * window.dilations[1] - window.begin[1]
                    phase = y % fine_in * fine_in + x % fine_in
                    result.append((y // fine_in, x // fine_in, phase))
    return result


def offsets_of(window: Window, source: Planes, out: Planes) -> list[tuple[int, ...]]:
    """Vectors from the output to the input, for each output phase and kernel entry."""
    pitch, stride = source.grid.pitch, source.stride
    flat = [phase * stride + dy * pitch + dx for dy, dx, phase in taps_of(window, source.factor, out.factor)]
    entries = math.prod(window.kernel)
    return [tuple(flat[i : i + entries]) for i in range(0, len(flat), entries)]


def reach(source: Planes, taps: Sequence[tuple[int, int, int]]) -> bool:
    """Have around each plane what these taps read; False where that is too far away."""
    places = [dy * source.grid.pitch + dx for dy, dx, _ in taps]
    return source.reach(max(0, -min(places)), max(0, *places))


def moved(source: Value, out: Planes, index: Callable[[], Array], stride: Callable[[], int]) -> Op:
    """Rows of pixels, or planes, to planes on another grid.

    Args:
        source: where the pixels are.
        out: where they go.
        index: makes the table that says where each place of a channel gets its pixel.
        stride: says how many floats lie between channels of the source.
    """
    lengths = (source.grid.length if isinstance(source, Planes) else 0, out.grid.length)
    if (
        max(lengths) * out.grid.lanes > _MOST_PLACES
        # Squares of vectors would be more than half empty.
        or 2 * min(filter(None, lengths)) <= out.grid.lanes
        or out.factor not in (1, 2, 4)
        or (isinstance(source, Planes) and source.factor > 1)
    ):
        return gather(source, out, index, stride)
    out.padded = True

    def finish(struct: Operation, kept: list[object]) -> None:
        grid = source.grid if isinstance(source, Planes) else None
        # Entries in rows may have come to their shape by a Reshape, which the value does not know.
        length, pitch = (0, out.shape[3]) if grid is None else (grid.length, grid.pitch)
        table = (length, pitch, out.factor, *out.shape[2:], out.grid.pitch)
        struct.index = address(np.array(table, np.int32), kept)
        struct.in_stride, struct.inner = stride(), out.stride * out.grid.lanes

    return Op(Kind.REGRID, source, out, finish=finish)


def gather(source: Value, out: Value, index: Callable[[], Array], step: Callable[[], int]) -> Op:
    if isinstance(out, Planes):
        out.padded = True

    def finish(struct: Operation, kept: list[object]) -> None:
        table = index()
        struct.index = address(np.ascontiguousarray(np.maximum(table, 0), np.int32), kept)
        struct.count = table[0].size if isinstance(out, Planes) else table.size
        struct.in_stride = step()
        if isinstance(out, Planes):
            struct.inner = out.stride * out.grid.lanes
        else:
            struct.phases, struct.inner = 1, struct.count
            struct.channels = source.channels if isinstance(source, Planes) else 1
            struct.length = 0

    return Op(Kind.GATHER, source, out, finish=finish)


def loaded(source: Value, out: Planes) -> Op:
    """Pixels in rows to planes."""
    return moved(source, out, out.pixels, lambda: out.shape[2] * out.shape[3])


def copied(source: Value, out: Flat) -> Op:
    """Any value to entries in order."""
    if isinstance(source, Rows):
        return Op(Kind.TO_ROWS, source, out, finish=rowwise(source.channels, source.shape[3], source.grid.length))
    if isinstance(source, Planes):
        return gather(source, out, source.places, lambda: source.phases * source.stride * source.grid.lanes)

    def finish(struct: Operation, kept: list[object]) -> None:  # noqa: ARG001
        struct.count, struct.length = out.entries, 0

    return Op(Kind.GATHER, source, out, finish=finish)


def rowwise(features: int, count: int, length: int = 0) -> Callable[[Operation, list[object]], None]:
    """Sizes of a move between rows of features and planes."""

    def finish(struct: Operation, kept: list[object]) -> None:  # noqa: ARG001
        struct.count, struct.inner = features, count
        struct.length = length or struct.length

    return finish


def regridded(source: Planes, out: Planes, step: int) -> Op:
    """Every `step`-th pixel of planes on one grid to planes on another."""

    def index() -> Array:
        places = source.places()[::step, ::step][: out.shape[2], : out.shape[3]]
        pixel = out.pixels()
        return np.asarray(places.reshape(-1)[np.maximum(pixel, 0)])

    how = moved if step == 1 else gather
    return how(source, out, index, lambda: source.phases * source.stride * source.grid.lanes)
