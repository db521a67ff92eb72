"""Weights as work records, in the order in which the kernels read them.

A record is a value and the distance, in vectors, from the output to the input that it multiplies. Records are grouped
by part (output channels of one thread, one phase), block (input channels that fit in the cache together) and output
channel. Within a block the channels are sorted by their number of records: a loop that runs as often as the one before
is predicted by the processor.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from dsr_tool.errors import FormatError
from dsr_tool.graph.limits import claim
from dsr_tool.runtime.kernels.ops import LIMITS
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor

__all__ = ["MAX_OFFSET", "Pack", "Taps", "checked_positions", "pack_dense", "pack_sparse"]

_Int = npt.NDArray[np.int64]

MAX_OFFSET = 65535
"""Largest offset within a block, in vectors: it is held in 16 bits."""


@dataclass(frozen=True)
class Taps:
    """The entries of a kernel in one output phase.

    Attributes:
        offsets: vectors from an output to the input of each kernel entry in the first input channel.
        channel: vectors from one input channel to the next.
    """

    offsets: tuple[int, ...]
    channel: int


@dataclass(frozen=True, eq=False)
class Pack:
    """The packed weight of one op. The columns of the integer arrays are the fields of structs in ops.def, in order.

    Attributes:
        values: weights in the order of use: float32, or int8 for codes of a grid.
        offsets: offset of each record in vectors, uint16, and two more that kernels may read.
        entries: rows of the struct Entry in ops.def, int32 (entries, 2).
        blocks: rows of the struct Block, int64 (blocks, 5).
        parts: rows of the struct Part, int64 (parts, 4).
    """

    values: npt.NDArray[np.float32] | npt.NDArray[np.int8]
    offsets: npt.NDArray[np.uint16]
    entries: npt.NDArray[np.int32]
    blocks: _Int
    parts: _Int

    @property
    def coded(self) -> bool:
        """True if the weights are codes of a grid."""
        return self.values.dtype == np.int8

    @property
    def fields(self) -> dict[str, int | npt.NDArray[Any]]:
        """All arrays by name, and a null pointer; the structs of ops.def that use a pack have fields of these names."""
        name, absent = ("codes", "values") if self.coded else ("values", "codes")
        fields: dict[str, int | npt.NDArray[Any]] = {name: self.values, absent: 0}
        return fields | {"offsets": self.offsets, "entries": self.entries, "blocks": self.blocks, "parts": self.parts}

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in (self.values, self.offsets, self.entries, self.blocks, self.parts))


@dataclass
class _Builder:
    """The arrays of a pack while parts are added."""

    dtype: npt.DTypeLike
    values: list[npt.NDArray[Any]] = field(default_factory=list)
    offsets: list[npt.NDArray[np.uint16]] = field(default_factory=list)
    entries: list[npt.NDArray[np.int32]] = field(default_factory=list)
    blocks: list[_Int] = field(default_factory=list)
    parts: list[tuple[int, int, int, int]] = field(default_factory=list)

    def add_part(self, phase: int, dense: bool, *block_columns: _Int) -> None:
        """Adds a part of one phase; the columns of its blocks are in the order of the struct Block."""
        first = _length(self.blocks)
        self.blocks.append(np.stack(np.broadcast_arrays(*block_columns), axis=1).astype(np.int64))
        self.parts.append((first, first + len(self.blocks[-1]), phase, int(dense)))

    def build(self) -> Pack:
        """Returns the pack of all parts."""
        # Kernels convert whole vectors of codes.
        spare = LIMITS["SPARE_CODES"] if self.dtype == np.int8 else 0
        values = np.concatenate([*self.values, np.zeros(spare, self.dtype)])
        # Kernels read up to two offsets past the last record.
        offsets = np.concatenate([*self.offsets, np.zeros(2, np.uint16)])
        entries, blocks = np.concatenate(self.entries), np.concatenate(self.blocks)
        return Pack(values, offsets, entries, blocks, np.array(self.parts, np.int64))


def pack_sparse(weight: SparseTensor, groups: int, phases: Sequence[Taps], per_block: int, split: int = 1) -> Pack:
    """Packs one record for each active weight and output phase.

    Args:
        weight: shape (out channels, channels / groups, *kernel); float32 values, or int8 codes of a grid.
        groups: number of groups of channels; an output channel sees the input channels of its group alone.
        phases: the taps of each output phase.
        per_block: input channels in a block.
        split: number of parts that the output channels of ungrouped weights are cut into, of about equal work.

    Raises:
        FormatError: active positions are out of range or not ascending, or a tap is out of the range of offsets.
    """
    rows, inner = weight.mask.shape[:2]
    kernel = len(phases[0].offsets)
    positions = checked_positions(weight.mask)
    _check_reach(phases, per_block)
    # int32 moves half as many bytes as int64; `is_packable` has made sure that positions fit.
    row, rest = np.divmod(positions.astype(np.int32), np.int32(max(inner * kernel, 1)))
    channel, tap = np.divmod(rest, np.int32(kernel))
    values = weight.values
    builder = _Builder(values.dtype)
    for low, high, first, last in _part_bounds(row, rows, inner, groups, per_block, split):
        own = slice(*np.searchsorted(row, (low, high)))
        inside = channel[own] + ((row[own] - low) // np.int32(rows // groups) * np.int32(inner) if groups > 1 else 0)
        # At least one block, even of a weight without records: it writes the bias.
        number = np.arange(max(-(-(last - first) // per_block), 1))
        target, order, counts = _by_block(row[own] - low, inside // np.int32(per_block), high - low, len(number))
        starts = np.cumsum(counts.sum(axis=0)) - counts.sum(axis=0)
        first_value, first_entry = _length(builder.values), _length(builder.entries)
        builder.values.append(_scattered(values[own], target))
        builder.entries.append(np.stack((order.T.ravel() + low, counts.T.ravel()), axis=1).astype(np.int32))
        packed_offsets: dict[tuple[int, ...], int] = {}
        for phase, taps in enumerate(phases):
            lowest = min(taps.offsets)
            # Phases that differ by a shift alone share their offsets; the base of their blocks has the shift.
            shape = tuple(offset - lowest for offset in taps.offsets)
            if shape not in packed_offsets:
                packed_offsets[shape] = _length(builder.offsets)
                offset = inside % np.int32(per_block) * np.int32(taps.channel) + np.array(shape, np.int32)[tap[own]]
                builder.offsets.append(_scattered(offset.astype(np.uint16), target))
            base = (first + number * per_block) * taps.channel + lowest
            entries = first_entry + number * (high - low)
            columns_of_blocks = (base, first_value + starts, packed_offsets[shape] + starts, entries)
            builder.add_part(phase, False, *columns_of_blocks, np.array(high - low))
    return builder.build()


def _part_bounds(
    row: npt.NDArray[np.int32], rows: int, inner: int, groups: int, per_block: int, split: int
) -> list[tuple[int, int, int, int]]:
    """Returns for each part its first row, the row after its last, and the same of the input channels it reads."""
    if groups > 1:
        # As many groups as fill a block.
        at_once, size = max(per_block // max(inner, 1), 1), rows // groups
        firsts = range(0, groups, at_once)
        return [
            (i * size, min(i + at_once, groups) * size, i * inner, min(i + at_once, groups) * inner) for i in firsts
        ]
    # One more for each row, since a row without records costs a load and a store too.
    work = np.cumsum(np.bincount(row, minlength=rows) + 1)
    cuts = [0, *(int(np.searchsorted(work, work[-1] * i / split)) for i in range(1, split)), rows]
    return [(low, high, 0, inner) for low, high in itertools.pairwise(cuts) if low < high]


def _by_block(
    row: npt.NDArray[np.int32], block: npt.NDArray[np.int32], rows: int, blocks: int
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Returns the new index of each record; and by rank and block, the row of that rank and its number of records.

    Records come sorted by row, then block, so records that stay together are moved as one run.
    """
    claim((rows, blocks), np.int64)
    counts = np.bincount(row * np.int32(blocks) + block, minlength=rows * blocks).reshape(rows, blocks)
    # Stable, so that the order of sums, and with it every bit of the result, depends on the mask alone.
    order = np.argsort(-counts, axis=0, kind="stable")
    ranked = np.take_along_axis(counts, order, axis=0)
    ends = np.cumsum(ranked.T.ravel()).reshape(blocks, rows).T
    target = np.empty_like(counts)
    np.put_along_axis(target, order, ends - ranked, axis=0)
    source = np.cumsum(counts.ravel()) - counts.ravel()
    return np.arange(len(row)) + np.repeat(target.ravel() - source, counts.ravel()), order, ranked


def _scattered(array: npt.NDArray[Any], target: npt.NDArray[np.intp]) -> npt.NDArray[Any]:
    result = np.empty_like(array)
    result[target] = array
    return result


def pack_dense(weight: npt.NDArray[Any], phases: Sequence[Taps], per_block: int, split: int = 1) -> Pack:
    """Packs groups of four output channels, zeros included; their records share one list of offsets in each block.

    Args:
        weight: shape (out channels, channels, *kernel); float32 values, or int8 codes of a grid.
        phases: the taps of each output phase.
        per_block: input channels in a block.
        split: number of parts that the groups are cut into.

    Raises:
        FormatError: a tap is out of the range of offsets.
    """
    rows, inner = weight.shape[:2]
    kernel = len(phases[0].offsets)
    per_block = min(per_block, inner)
    _check_reach(phases, per_block)
    quads = -(-rows // 4)
    padded = np.zeros((quads * 4, inner * kernel), weight.dtype)
    padded[:rows] = weight.reshape(rows, -1)
    # The kernel computes the last channel as often as it takes to make four.
    padded[rows:] = padded[rows - 1]
    bounds = sorted({quads * i // split for i in range(split + 1)})
    builder = _Builder(weight.dtype)
    lows = np.arange(0, inner, per_block)
    counts = np.minimum(lows + per_block, inner) - lows
    for low, count in zip(lows, counts, strict=True):
        # Four values for each offset lie together, as the kernel broadcasts them together.
        part = padded[:, low * kernel : (low + count) * kernel].reshape(quads, 4, -1)
        builder.values.append(np.ascontiguousarray(part.transpose(0, 2, 1)).ravel())
        rows_and_counts = (np.arange(quads) * 4, np.full(quads, count * kernel))
        builder.entries.append(np.stack(rows_and_counts, axis=1).astype(np.int32))
    number = np.arange(len(lows))
    firsts = []
    for taps in phases:
        firsts.append(_length(builder.offsets))
        offsets = np.arange(per_block)[:, None] * taps.channel + np.array(taps.offsets) - min(taps.offsets)
        builder.offsets.append(offsets.astype(np.uint16).ravel())
    for low, high in itertools.pairwise(bounds):
        for phase, taps in enumerate(phases):
            base = lows * taps.channel + min(taps.offsets)
            values = 4 * kernel * (quads * lows + low * counts)
            entries = number * quads + low
            builder.add_part(phase, True, base, values, np.array(firsts[phase]), entries, np.array(high - low))
    return builder.build()


def checked_positions(mask: Mask) -> _Int:
    """Returns the active positions. The kernels do not check them again.

    Raises:
        FormatError: they do not ascend within the shape.
    """
    positions = mask.positions
    if len(positions) and not (positions[0] >= 0 and positions[-1] < mask.size and (np.diff(positions) > 0).all()):
        raise FormatError(
            f"the active positions of a weight are not ascending within its shape {mask.shape}; the file is damaged."
        )
    return positions


def _check_reach(phases: Sequence[Taps], per_block: int) -> None:
    farthest = max(max(taps.offsets) - min(taps.offsets) + (per_block - 1) * taps.channel for taps in phases)
    if farthest > MAX_OFFSET:
        raise FormatError(
            f"a convolution reaches {farthest:,} vectors, farther than the {MAX_OFFSET:,} of an offset; use "
            f"runtime 'scipy'."
        )


def _length(arrays: Sequence[npt.NDArray[Any]]) -> int:
    return sum(map(len, arrays))
