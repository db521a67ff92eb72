"""The addresses of values: one arena, in which values that are never needed together share memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dsr_tool.runtime.compiler.layouts import Planes, Value
from dsr_tool.runtime.compiler.op import Op
from dsr_tool.runtime.compiler.segment import Segment

__all__ = ["Address", "Arena", "allocate"]

_SLACK = 64
"""Slack around the arena, in floats, because kernels may read past the ends."""


class Address(NamedTuple):
    """The place of a value.

    Attributes:
        buffer: 0 for the arena, otherwise the number of an array of the caller.
        offset: floats from the start of the buffer to the first entry.
    """

    buffer: int
    offset: int


class Arena(NamedTuple):
    """The addresses of all values of a segment.

    Attributes:
        floats: size of the arena.
        addresses: address of each value.
    """

    floats: int
    addresses: Mapping[Value, Address]


def allocate(segment: Segment) -> Arena:
    """Returns an address for each value: the largest first, each as low as values alive at the same time allow."""
    addresses: dict[Value, Address] = {
        array: Address(number, 0) for number, array in enumerate(segment.arrays, start=1)
    }
    lifetimes = {value: time for value, time in _lifetimes(segment.ops).items() if value not in addresses}
    blocks: list[tuple[int, int, Value]] = []
    # Small values fill the gaps that large ones leave; in the order of the ops the arena would be larger.
    for value in sorted(lifetimes, key=lambda value: -value.size):
        first, last = lifetimes[value]
        start = _SLACK
        for low, high, other in sorted(blocks, key=lambda block: block[0]):
            other_first, other_last = lifetimes[other]
            alive_together = other_last >= first and last >= other_first
            # Blocks come by their start, so moving past one never has to be undone.
            if alive_together and low < start + value.size and start < high:
                start = high
        blocks.append((start, start + value.size, value))
        # The first halo belongs to the value's memory, and offsets count from the first vector after it.
        addresses[value] = Address(0, start + value.lead)
    for op in segment.ops:
        for part in (op.source, op.other, op.out):
            if isinstance(part, Planes) and part.whole is not None:
                offset = addresses[part.whole].offset + part.first_channel * part.channel_step
                addresses[part] = Address(0, offset)
    return Arena(max((high for _, high, _ in blocks), default=0) + _SLACK, addresses)


def _lifetimes(ops: Sequence[Op]) -> dict[Value, tuple[int, int]]:
    """Returns the index of the op that makes each value, and of the last op that touches it."""
    lifetimes: dict[Value, tuple[int, int]] = {}
    for i, op in enumerate(ops):
        for part in (op.source, op.other, op.out):
            if part is not None:
                # Parts lie in the memory of their whole.
                value = part.root if isinstance(part, Planes) else part
                # A value that is read before an op makes it is an array of the caller, whose lifetime does not count.
                first, _ = lifetimes.get(value, (i, i))
                lifetimes[value] = (first, i)
    return lifetimes
