"""The memory of a plan, computed from the plan: nothing has to be measured to know it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dsr_tool.runtime.compiler.program import FallbackStep, KernelStep
from dsr_tool.sparsity.tensor import Array

__all__ = ["PlanMemory", "memory_of"]


@dataclass(frozen=True)
class PlanMemory:
    """Bytes that a plan needs; what numpy allocates inside a fallback while it runs is not part of it.

    Attributes:
        arena_bytes: the arena, which all segments use in turn, and the scratch of the threads beside it.
        weight_bytes: packed weights, each counted once however many ops share it.
        table_bytes: biases, pixel masks and index tables of the ops, and the array of ops itself. A bias that is the
            memory of a tensor which the caller keeps does not count.
        constant_bytes: dense weights and constants that fallbacks read, without those of kept tensors likewise.
        array_bytes: arrays that segments and fallbacks hand to each other, at the moment when they are largest
            together; the output is part of it, the input is not.
    """

    arena_bytes: int
    weight_bytes: int
    table_bytes: int
    constant_bytes: int
    array_bytes: int

    @property
    def total_bytes(self) -> int:
        """Sum of all parts."""
        return self.arena_bytes + self.weight_bytes + self.table_bytes + self.constant_bytes + self.array_bytes


def memory_of(
    steps: Sequence[KernelStep | FallbackStep], caller_arrays: Iterable[str], kept: Iterable[Array] = ()
) -> PlanMemory:
    """Returns the memory of steps that run one after another.

    Args:
        steps: the segments and fallbacks of a plan, in order.
        caller_arrays: names of arrays that belong to the caller.
        kept: arrays that the caller keeps and counts itself; tables and constants may be views of them.
    """
    kernel_steps = [step for step in steps if isinstance(step, KernelStep)]
    fallbacks = [step for step in steps if isinstance(step, FallbackStep)]
    # Ops that share a weight keep the same pack, so packs are counted by identity.
    packs = {id(pack): pack.nbytes for step in kernel_steps for pack in step.packs}
    tables = _by_address(table for step in kernel_steps for table in step.tables)
    constants = _by_address(array for step in fallbacks for array in step.constants.values())
    # A bias and a dense weight are used where they lie, so the tensor and the table are the same memory.
    for address in _by_address(kept):
        tables.pop(address, None)
        constants.pop(address, None)
    return PlanMemory(
        arena_bytes=max((step.arena_bytes for step in kernel_steps), default=0)
        + max((step.scratch_bytes for step in kernel_steps), default=0),
        weight_bytes=sum(packs.values()),
        table_bytes=sum(tables.values()) + sum(ctypes.sizeof(step.ops) for step in kernel_steps),
        constant_bytes=sum(constants.values()),
        array_bytes=_peak(steps, frozenset(caller_arrays)),
    )


def _by_address(arrays: Iterable[Array]) -> dict[int, int]:
    """Returns the bytes of arrays by their address, so that views of the same memory count once."""
    return {array.ctypes.data: array.nbytes for array in arrays if array.nbytes}


def _peak(steps: Sequence[KernelStep | FallbackStep], caller_arrays: frozenset[str]) -> int:
    """Returns the largest total of arrays that are alive at once."""
    alive: dict[str, int] = {}
    most = 0
    for step in steps:
        # A fallback drops its inputs when its outputs are there, so both count for a moment.
        alive.update({name: nbytes for name, nbytes in step.output_bytes.items() if name not in caller_arrays})
        most = max(most, sum(alive.values()))
        for name in step.release:
            alive.pop(name, None)
    return most
