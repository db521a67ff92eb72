"""Weights as work records, in the order in which the kernels use them.

A record is a value and the distance in vectors from the output to the input that it multiplies. Records are grouped
by part (channels of one thread, one phase), block (input channels that fit in the cache together) and output channel;
within a block the channels are sorted by their number of records, since the processor foresees a loop that runs as
often as the one before.
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
from dsr_tool.sparsity.tensor import SparseTensor

__all__ = ["FARTHEST", "Pack", "Taps", "pack_dense", "pack_sparse"]

_Int = npt.NDArray[np.int64]

FARTHEST = 65535
"""Largest offset within a block: it is held in 16 bits."""


@dataclass(frozen=True)
class Taps:
    """What the entries of a kernel mean in one output phase.

    Attributes:
        offsets: vectors from an output to the input of each kernel entry in the first channel.
        channel: vectors from one input channel to the next.
    """

    offsets: tuple[int, ...]
    channel: int


@dataclass(frozen=True, eq=False)
class Pack:
    """Arrays of one operation; `kernels/operation.h` says what their columns mean."""

    values: npt.NDArray[np.float32]
    offsets: npt.NDArray[np.uint16]
    entries: npt.NDArray[np.int32]
    blocks: _Int
    parts: _Int

    @property
    def arrays(self) -> tuple[npt.NDArray[Any], ...]:
        """Returns all arrays, in the order of the fields."""
        return self.values, self.offsets, self.entries, self.blocks, self.parts

    @property
    def nbytes(self) -> int:
        """Returns the bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays)


@dataclass
class _Pile:
    """Arrays that grow part by part."""

    values: list[npt.NDArray[np.float32]] = field(default_factory=list)
    offsets: list[npt.NDArray[np.uint16]] = field(default_factory=list)
    entries: list[npt.NDArray[np.int32]] = field(default_factory=list)
    blocks: list[_Int] = field(default_factory=list)
    parts: list[tuple[int, int, int, int]] = field(default_factory=list)

    def add(self, phase: int, dense: bool, *columns: _Int) -> None:
        """A part of one phase, with these columns of its blocks."""
        made = _length(self.blocks)
        self.blocks.append(np.stack(np.broadcast_arrays(*columns), axis=1).astype(np.int64))
        self.parts.append((made, made + len(self.blocks[-1]), phase, int(dense)))

    def pack(self) -> Pack:
        """All of them, joined."""
        values = np.concatenate([*self.values, np.zeros(0, np.float32)])
        # Kernels look up to two offsets past the last one.
        offsets = np.concatenate([*self.offsets, np.zeros(2, np.uint16)])
        entries, blocks = np.concatenate(self.entries), np.concatenate(self.blocks)
        return Pack(values, offsets, entries, blocks, np.array(self.parts, np.int64))


def pack_sparse(weight: SparseTensor, groups: int, phases: Sequence[Taps], per_block: int, split: int = 1) -> Pack:
    """One record for each active weight and output phase.

    Args:
        weight: shape (out channels, channels / groups, *kernel).
        groups: of channels that do not see each other.
        phases: the taps of each output phase.
        per_block: input channels in a block.
        split: parts that the output channels of ungrouped weights are cut into, of about equal work.
    """
    rows, inner = weight.mask.shape[:2]
    kernel = len(phases[0].offsets)
    _check(weight.mask.positions, weight.mask.size, phases, per_block)
    row, rest = np.divmod(weight.mask.positions.astype(np.int32), np.int32(max(inner * kernel, 1)))
    channel, tap = np.divmod(rest, np.int32(kernel))
    values = weight.values.astype(np.float32, copy=False)
    pile = _Pile()
    for low, high, first, last in _bounds(row, rows, inner, groups, per_block, split):
        own = slice(*np.searchsorted(row, (low, high)))
        inside = channel[own] + ((row[own] - low) // np.int32(rows // groups) * np.int32(inner) if groups > 1 else 0)
        number = np.arange(max(-(-(last - first) // per_block), 1))
        target, order, counts = _sorted(row[own] - low, inside // np.int32(per_block), high - low, len(number))
        starts = np.cumsum(counts.sum(axis=0)) - counts.sum(axis=0)
        made, rows_made = _length(pile.values), _length(pile.entries)
        pile.values.append(_moved(values[own], target))
        pile.entries.append(np.stack((order.T.ravel() + low, counts.T.ravel()), axis=1).astype(np.int32))
        known: dict[tuple[int, ...], int] = {}
        for phase, taps in enumerate(phases):
            lowest = min(taps.offsets)
            # Phases that differ by a shift alone share their offsets.
            shape = tuple(offset - lowest for offset in taps.offsets)
            if shape not in known:
                known[shape] = _length(pile.offsets)
                offset = inside % np.int32(per_block) * np.int32(taps.channel) + np.array(shape, np.int32)[tap[own]]
                pile.offsets.append(_moved(offset.astype(np.uint16), target))
            base = (first + number * per_block) * taps.channel + lowest
            entries = rows_made + number * (high - low)
            pile.add(phase, False, base, made + starts, known[shape] + starts, entries, np.array(high - low))
    return pile.pack()


def _bounds(
    row: npt.NDArray[np.int32], rows: int, inner: int, groups: int, per_block: int, split: int
) -> list[tuple[int, int, int, int]]:
    """Of each part: its rows, and the input channels that they read."""
    if groups > 1:
        # As many groups as fill a block.
        at_once, size = max(per_block // max(inner, 1), 1), rows // groups
        firsts = range(0, groups, at_once)
        return [
            (i * size, min(i + at_once, groups) * size, i * inner, min(i + at_once, groups) * inner) for i in firsts
        ]
    work = np.cumsum(np.bincount(row, minlength=rows) + 1)
    cuts = [0, *(int(np.searchsorted(work, work[-1] * i / split)) for i in range(1, split)), rows]
    return [(low, high, 0, inner) for low, high in itertools.pairwise(cuts) if low < high]


def _sorted(
    row: npt.NDArray[np.int32], block: npt.NDArray[np.int32], rows: int, blocks: int
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Where each record goes; and by rank and block, the row there and its number of records.

    Records come sorted by row, then block, so those that stay together are moved as one run.
    """
    claim((rows, blocks), np.int64)
    counts = np.bincount(row * np.int32(blocks) + block, minlength=rows * blocks).reshape(rows, blocks)
    order = np.argsort(-counts, axis=0, kind="stable")
    ranked = np.take_along_axis(counts, order, axis=0)
    ends = np.cumsum(ranked.T.ravel()).reshape(blocks, rows).T
    target = np.empty_like(counts)
    np.put_along_axis(target, order, ends - ranked, axis=0)
    source = np.cumsum(counts.ravel()) - counts.ravel()
    return np.arange(len(row)) + np.repeat(target.ravel() - source, counts.ravel()), order, ranked


def _moved(array: npt.NDArray[Any], target: npt.NDArray[np.intp]) -> npt.NDArray[Any]:
    result = np.empty_like(array)
    result[target] = array
    return result


def pack_dense(weight: npt.NDArray[np.float32], phases: Sequence[Taps], per_block: int, split: int = 1) -> Pack:
    """Groups of four output channels, whose records share one list of offsets in each block.

    Args:
        weight: shape (out channels, channels, *kernel).
        phases: the taps of each output phase.
        per_block: input channels in a block.
        split: parts that the groups are cut into.
    """
    rows, inner = weight.shape[:2]
    kernel = len(phases[0].offsets)
    _check(np.zeros(0, np.int64), 0, phases, min(per_block, inner))
    quads = -(-rows // 4)
    per_block = min(per_block, inner)
    padded = np.zeros((quads * 4, inner * kernel), np.float32)
    padded[:rows] = weight.reshape(rows, -1)
    # The kernel writes the last channel as often as it takes to make four.
    padded[rows:] = padded[rows - 1]
    bounds = sorted({quads * i // split for i in range(split + 1)})
    pile = _Pile()
    lows = np.arange(0, inner, per_block)
    counts = np.minimum(lows + per_block, inner) - lows
    for low, count in zip(lows, counts, strict=True):
        part = padded[:, low * kernel : (low + count) * kernel].reshape(quads, 4, -1)
        pile.values.append(np.ascontiguousarray(part.transpose(0, 2, 1)).ravel())
        pile.entries.append(np.stack((np.arange(quads) * 4, np.full(quads, count * kernel)), axis=1).astype(np.int32))
    number = np.arange(len(lows))
    firsts = []
    for taps in phases:
        firsts.append(_length(pile.offsets))
        offsets = np.arange(per_block)[:, None] * taps.channel + np.array(taps.offsets) - min(taps.offsets)
        pile.offsets.append(offsets.astype(np.uint16).ravel())
    for low, high in itertools.pairwise(bounds):
        for phase, taps in enumerate(phases):
            base = lows * taps.channel + min(taps.offsets)
            values = 4 * kernel * (quads * lows + low * counts)
            entries = number * quads + low
            pile.add(phase, True, base, values, np.array(firsts[phase]), entries, np.array(high - low))
    return pile.pack()


def _check(positions: _Int, size: int, phases: Sequence[Taps], per_block: int) -> None:
    """Raise `FormatError` unless the kernels will stay inside of what they are given: they do not look again."""
    if len(positions) and not (positions[0] >= 0 and positions[-1] < size and (np.diff(positions) > 0).all()):
        raise FormatError("a weight has active positions that do not rise within its shape; the file is damaged.")
    farthest = max(max(taps.offsets) - min(taps.offsets) + (per_block - 1) * taps.channel for taps in phases)
    if farthest > FARTHEST:
        raise FormatError("a convolution reaches farther than its kernel can.")


def _length(arrays: Sequence[npt.NDArray[Any]]) -> int:
    return sum(map(len, arrays))
