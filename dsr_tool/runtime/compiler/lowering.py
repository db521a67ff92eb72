"""From nodes to ops: the state of lowering, and the requests that lowering rules share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dsr_tool.errors import DsrError
from dsr_tool.graph.ir import Node
from dsr_tool.graph.limits import claim
from dsr_tool.graph.operators import operator_of
from dsr_tool.runtime.compiler.constants import Constants
from dsr_tool.runtime.compiler.grids import Grids
from dsr_tool.runtime.compiler.layouts import Flat, Grid, Planes, Rows, Value
from dsr_tool.runtime.compiler.op import Op, Target
from dsr_tool.runtime.compiler.picked import Picked
from dsr_tool.runtime.compiler.picking import can_be_planes, constant_of, pick_to_flat, pick_to_planes
from dsr_tool.runtime.compiler.relayout import FromRows, to_flat, to_planes
from dsr_tool.runtime.compiler.segment import Segment
from dsr_tool.runtime.compiler.summary import Origin
from dsr_tool.runtime.coverage import Fallback, describe_failure

__all__ = ["Lowered", "Lowering", "Rule"]

MAX_PIXELS = 1 << 24
"""Largest plane, in pixels, for which tables are made: positions are counted in int32, with room for halos."""


class Lowered(NamedTuple):
    """The result of lowering a node.

    Attributes:
        value: the first output of the node.
        shape: its shape in the graph, which a value of rows does not know.
    """

    value: Value
    shape: tuple[int, ...]


Rule = Callable[..., Lowered | None]
"""Lowers one node: called with the lowering, the node and its attributes as keywords. Returns None if no kernel
supports this form of the operator; ops that it added before are removed then."""


class Lowering:
    """Lowers nodes, one segment at a time.

    Attributes:
        nodes: the nodes of the graph, in order.
        constants: values that are known before the graph runs.
        target: the kernels.
        grids: the grids of the graph.
        segment: the segment that is being lowered.
        shapes: shape of every value that is not known, the batch first.
        types: type of every output of a fallback.
        values: the layouts in which the segment has values, by name.
        images: size of the batch.
        index: the node that is being lowered.
    """

    def __init__(self, nodes: Sequence[Node], constants: Constants, target: Target, rules: Mapping[str, Rule]) -> None:
        self.nodes, self.constants, self.target, self._rules = nodes, constants, target, rules
        self.grids = Grids(nodes, constants, rules, target.lanes)
        self.segment = Segment(target.lanes, 1)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.types: dict[str, npt.DTypeLike] = {}
        self.values: dict[str, Value] = {}
        self.images, self.index = 1, 0
        self._readers: dict[str, list[int]] = {}
        for i, node in enumerate(nodes):
            for name in node.inputs:
                self._readers.setdefault(name, []).append(i)

    def begin(self, name: str, shape: tuple[int, ...], outputs: Iterable[str]) -> None:
        """Begins the first segment.

        Args:
            name: the input of the graph.
            shape: its shape, the batch first.
            outputs: the values that the plan returns.
        """
        self.images = shape[0]
        self.start(self.images)
        self.shapes[name] = shape
        for output in outputs:
            self._readers.setdefault(output, []).append(len(self.nodes))

    def start(self, batch: int | None = None) -> None:
        """Begins a new segment: values that were made before come back as arrays.

        Args:
            batch: number of times that it runs, each time on the next piece of every array: once for each image, or
                once for rows that are all alike; as before when absent.
        """
        self.segment = Segment(self.target.lanes, self.segment.batch if batch is None else batch)
        self.values = {}

    @property
    def batch(self) -> int:
        """Number of times that the segment runs."""
        return self.segment.batch

    def alive(self, index: int) -> list[str]:
        """Returns the values made in this segment that nodes from `index` on read."""
        # Inputs of the segment are arrays already.
        own = [name for name in self.values if name not in self.segment.inputs]
        return [name for name in own if self._readers.get(name, [-1])[-1] >= index]

    def last_read_by(self, index: int) -> list[str]:
        """Returns the values that no node after `index` reads."""
        return [name for name in self.nodes[index].inputs if name and self._readers[name][-1] == index]

    def batch_of(self, index: int) -> int | None:
        """Returns the number of times that a segment with this node should run; None if any number is right."""
        node = self.nodes[index]
        rank = len(self.shapes.get(node.inputs[0], ())) if node.inputs else 0
        row = operator_of(node.op)
        if row.by_row and rank:
            return 1
        return self.images if row.by_image and rank == 4 else None

    def lower(self, index: int) -> Fallback | None:
        """Lowers one node. Returns None, or a fallback that says why no kernel computes the node."""
        node = self.nodes[index]
        rule = self._rules.get(node.op)
        if rule is None:
            return Fallback(node.op, node.outputs[0], "no kernel")
        self.index, self.segment.origin = index, Origin.of(node, self.constants)
        # A rule may add and fuse ops before it finds that it cannot go on; all of that is undone then.
        before = (list(self.segment.ops), dict(self.segment.inputs), dict(self.values))
        reason = "declined"
        try:
            lowered = rule(self, node, **node.attributes)
            if lowered is not None:
                claim(lowered.shape, np.float32)
        except DsrError:
            lowered = None  # the node is invalid, and the reference says what is wrong with it
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            # Either the node is invalid, or the rule has a bug. A model must run in both cases, so this is a fallback;
            # it is told apart from a form that has no kernel, so that tests can fail and `bench` can name it.
            lowered, reason = None, describe_failure(error)
        if lowered is None:
            self.segment.ops, self.segment.inputs, self.values = before
            return Fallback(node.op, node.outputs[0], reason)
        self.values[node.outputs[0]], self.shapes[node.outputs[0]] = lowered
        return None

    def array(self, name: str) -> Flat:
        """Returns a value as an array of the caller: one that this segment fills if it makes the value, else reads."""
        value = self.values.get(name)
        if name in self.segment.inputs:
            return self.segment.inputs[name]
        if name in self.segment.outputs:
            return self.segment.outputs[name]
        out = self.new_flat(self.shapes[name])
        if value is None:
            self.segment.inputs[name] = out
            self.values[name] = out
        elif isinstance(value, Flat) and self.segment.may_be_array(value):
            value.shape = self.shapes[name]
            self.segment.outputs[name] = out = value
        else:
            self.segment.outputs[name] = out
            self.add(self._to_flat(value, out))
        return out

    # --- requests of rules ---------------------------------------------------------------------------------------

    def add(self, op: Op) -> Value:
        """Appends an op to the segment. Returns the value that it makes."""
        return self.segment.add(op)

    def new_flat(self, shape: tuple[int, ...]) -> Flat:
        """Returns a new value of entries in order."""
        return Flat(shape, self.target.lanes, self.batch)

    def value(self, name: str) -> Value | None:
        """Returns a float32 value in the layout that the segment has it in; None if it is unknown or not float32."""
        if name in self.values:
            return self._settled(name)
        # Ops run once for each piece of the batch, so a first axis of another size cannot be cut into pieces.
        if (
            not self.shapes.get(name)
            or 0 in self.shapes[name]
            or (self.batch > 1 and self.shapes[name][0] != self.batch)
            or self.types.get(name, np.float32) != np.float32
        ):
            return None
        return self.array(name)

    def planes(self, name: str) -> Planes | None:
        """Returns a value as planes, on the grid that suits the nodes that follow."""
        picked = self.values.get(name)
        if isinstance(picked, Picked) and (made := self._as_planes(name, picked)) is not None:
            return made
        value = self.flat(name) if isinstance(picked, Picked) else self.value(name)
        if isinstance(value, Rows):
            # The pixels of rows are the rows themselves, so a convolution has to see entries in order first.
            value = self.flat(name)
        if isinstance(value, Planes) or value is None:
            return value
        shape = self.shapes[name]
        if len(shape) != 4 or shape[2] * shape[3] > MAX_PIXELS or self.batch != shape[0]:
            return None
        grid, factor = self.grids.choose(name, shape[2], shape[3], self.index)
        planes = Planes(shape, grid, factor)
        if not planes.extend_halo(0, 0):
            return None
        self.add(to_planes(value, planes))
        self.values[name] = planes
        return planes

    def rows(self, name: str) -> Rows | None:
        """Returns a value as rows of features, its last axis."""
        picked = self.values.get(name)
        if isinstance(picked, Picked) and (made := self._as_rows(name, picked)) is not None:
            return made
        value = self.flat(name) if isinstance(picked, Picked) else self.value(name)
        if isinstance(value, Rows):
            return value
        flat, shape = self.flat(name), self.shapes.get(name, ())
        if flat is None or self.batch != 1 or math.prod(shape) > MAX_PIXELS:
            return None
        features, count = shape[-1], math.prod(shape[:-1])
        out = Rows((1, features, 1, count), self.grids.grid(1, count, 0), 1)
        self.add(FromRows(source=flat, out=out))
        self.values[name] = out
        return out

    def flat(self, name: str) -> Flat | None:
        """Returns a value as entries in order."""
        value = self.values.get(name) or self.value(name)
        if isinstance(value, Flat) or value is None:
            return value
        if isinstance(value, Picked) and isinstance(value.base, Flat) and value.is_in_order():
            # Two names of one value now: what is done to it must not be seen under the other one.
            self.segment.shared.add(value.base)
            self.values[name] = value.base
            return value.base
        out = self.new_flat(self.shapes[name])
        self.add(self._to_flat(value, out))
        if isinstance(value, Picked):
            self.values[name] = out
        return out

    def picked(self, name: str) -> Picked | None:
        """Returns a value, or a known array of float32, as entries of a value that lies in memory."""
        if name in self.constants:
            array = self.constants.dense(name)
            if array.dtype != np.float32 or not array.size:
                return None
            # All pieces of the batch share it.
            out = Flat(array.shape, self.target.lanes, 1)
            self.add(constant_of(array, out))
            return Picked.of(out, array.shape)
        value = self.values.get(name) or self.value(name)
        if value is None or isinstance(value, Picked):
            return value
        return Picked.of(value, self.piece(self.shapes[name]))

    def gathered(self, picked: Picked) -> Picked:
        """Returns picked entries as a value of their own, in order."""
        # One piece of the batch, or a known array that all pieces share.
        out = Flat(picked.shape, self.target.lanes, 1)
        self.add(pick_to_flat(picked, out))
        return Picked.of(out, picked.shape)

    def piece(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of what one run of the segment sees of a value."""
        return (1, *shape[1:]) if self.batch > 1 else shape

    def _to_flat(self, value: Value, out: Flat) -> Op:
        if not isinstance(value, Picked):
            return to_flat(value, out)
        return pick_to_flat(value, out)

    def _settled(self, name: str) -> Value | None:
        """Returns a value in a layout: a picked one in that in which its channels lie."""
        value = self.values[name]
        if not isinstance(value, Picked):
            return value
        channels = {group.axes for group in value.groups if group.kind == "channel"}
        last = len(value.shape) - 1
        made: Value | None = None
        if channels == {(1,)} and last == 3:
            made = self._as_planes(name, value)
        elif channels == {(last,)} and last:
            made = self._as_rows(name, value)
        return self.flat(name) if made is None else made

    def _as_planes(self, name: str, picked: Picked) -> Planes | None:
        """Returns picked entries as planes; None if one op cannot write them so."""
        shape = self.shapes[name]
        if len(shape) != 4 or shape[2] * shape[3] > MAX_PIXELS or self.batch != shape[0]:
            return None
        base = picked.base if isinstance(picked.base, Planes) and not isinstance(picked.base, Rows) else None
        same = base is not None and base.shape[2:] == shape[2:]
        if base is not None and same and picked.is_whole(1):
            self.segment.shared.add(base)
            self.values[name] = base
            return base
        if not can_be_planes(picked, 1):
            return None
        if base is not None and same and picked.has_pixels((0, 2, 3)):
            planes = Planes(shape, base.grid, base.factor)
        else:
            grid, factor = self.grids.choose(name, shape[2], shape[3], self.index)
            planes = Planes(shape, grid, factor)
        if not planes.extend_halo(0, 0):
            return None
        planes.nonnegative = base is not None and base.nonnegative and picked.factor >= 0
        self.add(pick_to_planes(picked, planes))
        self.values[name] = planes
        return planes

    def _as_rows(self, name: str, picked: Picked) -> Rows | None:
        """Returns picked entries as rows of features; None if one op cannot write them so."""
        shape, last = self.shapes[name], len(picked.shape) - 1
        if self.batch != 1 or math.prod(shape) > MAX_PIXELS:
            return None
        if isinstance(picked.base, Rows) and picked.is_whole(last):
            self.segment.shared.add(picked.base)
            self.values[name] = picked.base
            return picked.base
        if not can_be_planes(picked, last):
            return None
        features, count = shape[-1], math.prod(shape[:-1])
        rows = Rows((1, features, 1, count), self.grids.grid(1, count, 0), 1)
        self.add(pick_to_planes(picked, rows))
        self.values[name] = rows
        return rows

    def on_grid(self, source: Planes, grid: Grid, factor: int) -> Planes:
        """Returns the same pixels on another grid."""
        out = Planes(source.shape, grid, factor)
        out.nonnegative = source.nonnegative
        self.add(to_planes(source, out))
        return out

    def only_reader(self, name: str) -> bool:
        """Returns whether a single node reads a value, so that the value may be replaced by a fused one."""
        return len(self._readers.get(name, ())) == 1
