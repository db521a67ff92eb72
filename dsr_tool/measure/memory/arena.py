"""What onnxruntime's arena holds on to: more than what is alive at once, since it never gives memory back.

As an arena of its default settings behaves. The first run takes every value by itself from regions whose sizes double.
From the second run on, all values lie in one block, laid out by what the first run did; the arena has to find room
for that block as well. Resident is what was written to, not what was reserved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dsr_tool.graph.ir import Graph
from dsr_tool.measure.memory.peak import Size, Step

__all__ = ["Arena", "arena_bytes", "pattern_bytes"]

_PAGE, _ALIGNMENT, _PATTERN_ALIGNMENT = 4096, 256, 64
_FIRST_REGION, _LARGEST_GROWTH = 1 << 20, 1 << 30
_KEPT_WHOLE = 128 << 20  # a free chunk is split where it is twice as large as needed, or larger by this
_BINS = 21

Event = tuple[str, int]
"""A storage and its bytes where it is made, or -1 where it is given back."""


def arena_bytes(graph: Graph, steps: Sequence[Step], sizes: Mapping[str, Size]) -> int:
    """Resident bytes of the arena after two runs or more, without inputs and outputs, which are the caller's."""
    events = _events(graph, steps, sizes)
    arena = Arena()
    chunks: dict[str, Chunk] = {}
    for name, nbytes in events:
        if nbytes < 0:
            arena.free(chunks.pop(name))
        else:
            chunks[name] = arena.allocate(nbytes)
    block = pattern_bytes(events)
    if block:
        arena.allocate(block)
    return arena.resident_bytes


def pattern_bytes(events: Sequence[Event]) -> int:
    """Size of the block in which each value has the smallest gap that was free and fitted when it was made."""
    total, live = 0, dict[str, tuple[int, int]]()
    for name, nbytes in events:
        if nbytes < 0:
            del live[name]
            continue
        size, end, gaps = _rounded(nbytes, _PATTERN_ALIGNMENT), 0, []
        for offset, length in sorted(live.values()):
            gaps.append((offset - end, end))
            end = max(end, offset + length)
        gaps.append((total - end, end))
        _, start = min((gap for gap in gaps if gap[0] >= size), default=(0, end))
        live[name] = (start, size)
        total = max(total, start + size)
    return total


def _events(graph: Graph, steps: Sequence[Step], sizes: Mapping[str, Size]) -> list[Event]:
    """Makings and ends of all storages, in order."""
    ends = {sizes[value.name].storage for value in (*graph.inputs, *graph.outputs) if value.name in sizes}
    last = {name: i for i, step in enumerate(steps) for name in (*step.reads, *step.writes)}
    events: list[Event] = []
    made = set(ends)
    for i, step in enumerate(steps):
        events += [(name, sizes[name].nbytes) for name in step.writes if name not in made]
        made.update(step.writes)
        touched = dict.fromkeys((*step.reads, *step.writes))
        events += [(name, -1) for name in touched if last[name] == i and name not in ends]
    return events


def _rounded(nbytes: int, alignment: int) -> int:
    return -(-nbytes // alignment) * alignment


@dataclass(eq=False)
class Chunk:
    """Part of a region: where it begins, its size in bytes, and whether it is taken."""

    region: int
    start: int
    size: int
    taken: bool = False


@dataclass
class Arena:
    """Regions of memory, each cut into chunks in the order of their addresses.

    Attributes:
        regions: chunks by region.
        written: pages of each region that were written to.
    """

    regions: list[list[Chunk]] = field(default_factory=list)
    written: list[npt.NDArray[np.bool_]] = field(default_factory=list)
    _growth: int = _FIRST_REGION

    @property
    def resident_bytes(self) -> int:
        """Bytes of all pages that were written to."""
        return sum(int(pages.sum()) for pages in self.written) * _PAGE

    def allocate(self, nbytes: int) -> Chunk:
        """Take the free chunk that fits best, from a new region where there is none."""
        size = _rounded(max(nbytes, 1), _ALIGNMENT)
        chunk = self._free_chunk(size) or self._extend(size)
        chunks = self.regions[chunk.region]
        if chunk.size >= 2 * size or chunk.size - size >= _KEPT_WHOLE:
            rest = Chunk(chunk.region, chunk.start + size, chunk.size - size)
            chunks.insert(chunks.index(chunk) + 1, rest)
            chunk.size = size
        chunk.taken = True
        self.written[chunk.region][chunk.start // _PAGE : -(-(chunk.start + nbytes) // _PAGE)] = True
        return chunk

    def free(self, chunk: Chunk) -> None:
        """Give a chunk back; free neighbours become one."""
        chunk.taken = False
        chunks = self.regions[chunk.region]
        at = chunks.index(chunk)
        for left, right in ((at, at + 1), (at - 1, at)):
            if left >= 0 and right < len(chunks) and not chunks[left].taken and not chunks[right].taken:
                chunks[left].size += chunks.pop(right).size

    def _free_chunk(self, size: int) -> Chunk | None:
        free = [chunk for chunks in self.regions for chunk in chunks if not chunk.taken and chunk.size >= size]
        # Of equal ones the lowest address; the system hands out regions from the top down.
        return min(free, key=lambda chunk: (_bin(chunk.size), chunk.size, -chunk.region, chunk.start), default=None)

    def _extend(self, size: int) -> Chunk:
        grown = size > self._growth
        while size > self._growth:
            self._growth *= 2
        chunk = Chunk(len(self.regions), 0, self._growth)
        self.regions.append([chunk])
        self.written.append(np.zeros(self._growth // _PAGE, bool))
        if not grown:
            self._growth = min(2 * self._growth, max(_LARGEST_GROWTH, self._growth))
        return chunk


def _bin(size: int) -> int:
    return min((size // _ALIGNMENT).bit_length() - 1, _BINS - 1)
