"""A segment: ops that run in one call, while they are being lowered."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from dsr_tool.runtime.compiler.layouts import Flat, Planes, Value
from dsr_tool.runtime.compiler.op import Op
from dsr_tool.runtime.compiler.summary import Origin

__all__ = ["Segment"]


@dataclass(eq=False)
class Segment:
    """Ops that run in one call.

    Attributes:
        lanes: floats in a vector of the kernels.
        batch: number of times that the ops run, each time on the next piece of every array.
        ops: the ops, in order.
        inputs: arrays of the caller that it reads, by name.
        outputs: arrays of the caller that it fills, by name.
        origin: the node that is being lowered; None before the first.
        origins: the node of each op; of a fused one the first.
        shared: values that several names mean, which no later op may change.
        wholes: planes that other planes are parts of.
    """

    lanes: int
    batch: int
    ops: list[Op] = field(default_factory=list)
    inputs: dict[str, Flat] = field(default_factory=dict)
    outputs: dict[str, Flat] = field(default_factory=dict)
    origin: Origin | None = None
    origins: dict[Op, Origin | None] = field(default_factory=dict)
    shared: set[Value] = field(default_factory=set)
    wholes: list[Planes] = field(default_factory=list)

    def add(self, op: Op) -> Value:
        """Appends an op. Returns the value that it makes."""
        self.ops.append(op)
        self.origins[op] = self.origin
        return op.out

    def replace(self, old: Op, new: Op) -> None:
        """Puts one op in the position of another, as fusing does."""
        self.ops[self.ops.index(old)] = new
        self.origins[new] = self.origins[old]

    def maker(self, value: Value) -> Op | None:
        """Returns the op of this segment that makes a value, if it alone does and may be replaced."""
        if value in self.shared:
            return None
        # From the end, since a rule mostly asks for the latest value.
        return next((op for op in reversed(self.ops) if op.out is value), None)

    def is_made_before(self, value: Value, op: Op) -> bool:
        """Returns whether an op before `op` makes the value."""
        return any(earlier.out is value for earlier in self.ops[: self.ops.index(op)])

    def may_be_array(self, value: Flat) -> bool:
        """Returns whether a value may lie in an array of the caller: ops on it touch its entries and no more.

        Others read or write whole vectors, past the end of an array.
        """
        # Two names of one value, as a Reshape makes them, may not lie in one array: each has an array of its own.
        maker = self.maker(value)
        readers = [op for op in self.ops if value in (op.source, op.other)]
        return maker is not None and all(op.exact for op in (maker, *readers)) and value not in self.outputs.values()

    @property
    def arrays(self) -> Iterable[Flat]:
        """Arrays of the caller in the order of their buffers, from buffer 1 on."""
        return (*self.inputs.values(), *self.outputs.values())
