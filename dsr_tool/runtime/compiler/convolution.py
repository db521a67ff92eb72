"""Products of sparse weights: how they are cut into tiles and blocks, and convolutions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dsr_tool.graph.ir import Node
from dsr_tool.graph.windows import Window
from dsr_tool.runtime.compiler.gemv import mask_of, one_row, point_to
from dsr_tool.runtime.compiler.grids import shape_of
from dsr_tool.runtime.compiler.layouts import Planes, Value
from dsr_tool.runtime.compiler.lowering import Lowering, packable
from dsr_tool.runtime.compiler.packing import FARTHEST, Taps, pack_dense, pack_sparse
from dsr_tool.runtime.compiler.relayout import offsets_of, reach, regridded, taps_of
from dsr_tool.runtime.compiler.segment import Op
from dsr_tool.runtime.kernels.ops import Kind, Operation
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor, Weight, dense

__all__ = ["average_pool", "conv", "packed", "placed"]


MIN_DENSE = 0.7
"""Density from which four rows at a time, zeros and all, are quicker than one row without them."""
SPARSE_COST = 1.6
"""Time of a multiply-add in a sparse product, where one in a dense product takes 1."""
CACHE_BYTES = 40 << 10
"""Of input that a block of work reads often: it has to stay in the first-level cache."""
DENSE_BYTES, DENSE_TILE = 21 << 10, 6
"""Of input that a block of four rows at a time reads, and vectors of its tile."""
FAR_BYTES = 100 << 10
"""Of input that a block of work reads seldom."""
OFTEN = 0.12
"""Records of one output channel per input channel, from which an input counts as often read."""
WIDEST, NARROW = 14, 11
"""Vectors of a tile: at most, and where inputs are read seldom."""
LEAST_TILE, MANY_TILES = 5, 4
"""For more than one thread: vectors of a tile at least, and tiles for each that are shared out well as they are."""
MIN_RECORDS = 20
"""Of one output channel in a block, for which its sums are loaded and stored again."""
POINT_BYTES, POINT_DENSITY, POINT_RECORDS = 36 << 10, 0.25, 13
"""The same of kernels of one entry: what a block reads, from where on tiles are wide, and least records."""


def conv(into: Lowering, node: Node, *, group: int = 1, **_: Any) -> tuple[Value, tuple[int, ...]] | None:
    """A convolution over two axes by known weights."""
    weight = into.known.get(node.inputs[1])
    bias = into.known.get(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] else None
    window, shape = into.window(node), into.shapes.get(node.inputs[0], ())
    if weight is None or window is None or len(shape) != 4 or len(shape_of(weight)) != 4:
        return None
    rows, inner, *kernel = shape_of(weight)
    size = window.output_size(shape[2:])
    if (
        min(size) < 1
        or not isinstance(group, int)
        or group < 1
        or rows % group
        or inner * group != shape[1]
        or tuple(kernel) != window.kernel
        or (bias is not None and shape_of(bias) != (rows,))
        or len(set(window.strides)) != 1
        or not packable(weight)
    ):
        return None
    if (
        shape[2:] == (1, 1)
        and size == (1, 1)
        and math.prod(kernel) == 1
        and group == 1
        and not any(window.begin)
        and shape[0] == into.batch
    ):
        made_of = (shape[0], rows, 1, 1)
        value = one_row(into, node.inputs[0], weight, bias, made_of)
        return None if value is None else (value, made_of)
    source = into.planes(node.inputs[0])
    if source is None:
        return None
    made = placed(into, source, window, size, node)
    if made is None:
        return None
    source, window, out_factor = made
    out = Planes((shape[0], rows, *size), source.grid, out_factor)
    if not reach(source, taps_of(window, source.factor, out.factor)):
        return None
    addend = np.zeros(rows, np.float32) if bias is None else dense(bias)
    key = (node.op, node.inputs[1])
    op = Op(Kind.PRODUCT, source, out, bias=addend, finish=packed(into, key, source, out, window, group, weight))
    return into.segment.add(op), out.shape


def average_pool(into: Lowering, node: Node, *, ceil_mode: int = 0, count_include_pad: int = 0, **_: Any) -> Any:
    """A mean of what a window sees, as the depthwise convolution that it is where every window counts as many."""
    window, shape = into.window(node), into.shapes.get(node.inputs[0], ())
    if window is None or len(shape) != 4:
        return None
    padded = any((*window.begin, *window.end))
    if padded and (not count_include_pad or ceil_mode):
        return None
    if ceil_mode and window.output_size(shape[2:], ceil=True) != window.output_size(shape[2:]):
        return None
    weight = np.full((shape[1], 1, *window.kernel), 1 / math.prod(window.kernel), np.float32)
    name = f"{node.outputs[0]} weight"
    into.known[name] = SparseTensor(Mask.full(weight.shape), weight.ravel())
    names = ("strides", "pads", "dilations", "auto_pad", "kernel_shape")
    attributes = {key: value for key, value in node.attributes.items() if key in names}
    depthwise = Node("Conv", (node.inputs[0], name), node.outputs, {**attributes, "group": shape[1]})
    return conv(into, depthwise, group=shape[1])


def placed(
    into: Lowering, source: Planes, window: Window, size: tuple[int, ...], node: Node
) -> tuple[Planes, Window, int] | None:
    """The input on a grid that serves the window, the window there, and the factor of the output."""
    stride = window.strides[0]
    if source.factor % stride == 0:
        out = source.factor // stride
        pad = max(abs(dx) for _, dx, _ in taps_of(window, source.factor, out))
        if source.grid.fits(size[0], size[1], out) and pad <= source.grid.pad:
            return source, window, out
    name = node.inputs[0]
    if stride > 1 and math.prod(window.kernel) == 1 and not any((*window.begin, *window.end)):
        # Only every stride-th pixel is read.
        picked = Planes((*source.shape[:2], *size), into.grid(size[0], size[1], into.survey(node.outputs[0], 1)[0]), 1)
        picked.positive = source.positive
        into.segment.add(regridded(source, picked, stride))
        return picked, Window((1, 1), (1, 1), (1, 1), (0, 0), (0, 0)), 1
    pad = into.survey(name, stride)[0]
    rows = max(-(-source.shape[2] // stride), size[0])
    columns = max(-(-source.shape[3] // stride), size[1])
    out_planes = Planes(source.shape, into.grid(rows, columns, pad), stride)
    into.segment.add(regridded(source, out_planes, 1))
    return out_planes, window, 1


def packed(
    into: Lowering, name: Any, source: Planes, out: Planes, window: Window, group: int, weight: Weight
) -> Callable[[Operation, list[object]], None]:
    """What fills in a product once places are known: the taps of each phase, and the weights in their order."""

    def finish(struct: Operation, kept: list[object]) -> None:
        phases = [Taps(offsets, source.phases * source.stride) for offsets in offsets_of(window, source, out)]
        tensor = weight if isinstance(weight, SparseTensor) else SparseTensor.from_dense(weight, mask_of(weight))
        heavy = group == 1 and tensor.mask.density >= MIN_DENSE
        tile, per_block = tiling(into, source, window, tensor, heavy, phases)
        tile, split = shared_out(into.split, out.grid.length, tile, len(phases))
        key = (name, shape_of(weight), group, tuple(phases), per_block, split)
        pack = into.packs.get(key)
        if pack is None:
            pack = (
                pack_dense(dense(tensor), phases, per_block, split)
                if heavy
                else pack_sparse(tensor, group, phases, per_block, split)
            )
            into.packs[key] = pack
        point_to(struct, pack, kept)
        places = out.grid.length * into.lanes * len(phases)
        into.work += places * (tensor.mask.size if heavy else tensor.mask.active * SPARSE_COST)
        into.dense_work += math.prod(out.shape[2:]) * tensor.mask.size
        struct.inner = tile

    return finish


def shared_out(threads: int, length: int, tile: int, phases: int) -> tuple[int, int]:
    """Vectors of a tile, and parts that output channels are cut into, so that threads get equal shares.

    Each part reads the whole input again, so threads share the tiles of a plane where there are enough of them.
    """
    tiles = -(-length // tile) * phases
    if threads == 1 or tiles % threads == 0:
        return tile, 1
    even = -(-tiles // threads) * threads
    narrow = -(-length * phases // even)
    if tiles > threads and narrow >= LEAST_TILE:
        return narrow, 1
    return tile, 1 if tiles >= MANY_TILES * threads else threads


def tiling(
    into: Lowering, source: Planes, window: Window, weight: SparseTensor, heavy: bool, phases: Sequence[Taps]
) -> tuple[int, int]:
    """Vectors of a tile, and input channels of a block.

    Blocks keep what they read in the first-level cache, but each costs a load and a store of every output vector: where
    an input is read by few records, blocks are large, and tiles small.
    """
    records = weight.mask.active / max(weight.mask.shape[0] * weight.mask.shape[1], 1)
    length, lane_bytes = source.grid.length, 4 * into.lanes
    often, point = records >= OFTEN, max(window.kernel) == 1
    tile = min(length, DENSE_TILE if heavy else WIDEST if records >= (POINT_DENSITY if point else OFTEN) else NARROW)
    # Tiles of one plane are about equally wide.
    width = -(-length // -(-length // tile))
    vectors = max(_touched(taps.offsets, width) for taps in phases)
    if point:
        room, least = POINT_BYTES, POINT_RECORDS
    else:
        room, least = CACHE_BYTES if often else FAR_BYTES, MIN_RECORDS
    channels = max((DENSE_BYTES if heavy else room) / (vectors * lane_bytes), least / max(records, 1e-9))
    inner = weight.mask.shape[1] if source.channels == weight.mask.shape[1] else source.channels
    blocks = max(round(inner / max(channels, 1)), 1)
    reach = max(max(taps.offsets) - min(taps.offsets) for taps in phases)
    most = (FARTHEST - reach) // phases[0].channel
    return tile, max(min(-(-inner // blocks), most), 1)


def _touched(offsets: Sequence[int], width: int) -> int:
    """Vectors of one channel that a tile reads."""
    ordered = sorted(set(offsets))
    return width + sum(min(width, after - before) for before, after in itertools.pairwise(ordered))
