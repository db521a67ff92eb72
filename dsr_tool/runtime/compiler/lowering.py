"""From nodes to operations: what the rules for single operators share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np

from dsr_tool.errors import DsrError
from dsr_tool.graph.ir import Node
from dsr_tool.runtime.compiler.grids import WINDOWED, Grids, shape_of
from dsr_tool.runtime.compiler.layouts import Flat, Grid, Planes, Rows, Value
from dsr_tool.runtime.compiler.packing import Pack
from dsr_tool.runtime.compiler.relayout import copied, loaded, regridded, rowwise
from dsr_tool.runtime.compiler.segment import Op, Segment
from dsr_tool.runtime.compiler.constants import Known
from dsr_tool.runtime.coverage import Fallback, describe_failure
from dsr_tool.runtime.kernels.ops import Kind
from dsr_tool.sparsity.tensor import SparseTensor, Weight

__all__ = ["Lowering", "Rule", "packable"]

Rule = Callable[..., "tuple[Value, tuple[int, ...]] | None"]
"""Puts one node down: its value and shape, or None where no kernel computes it."""


MAX_PLACES = 1 << 24
_MOST_ENTRIES = 1 << 31
"""Of a weight, zeros and all: records are sorted by numbers of 32 bits."""
_EXACT = (Kind.GATHER, Kind.MEAN, Kind.REGRID, Kind.ROWS, Kind.SOFTMAX, Kind.TO_ROWS)
_BY_ROW = frozenset({"Gemm", "LayerNormalization", "MatMul"})
_BY_IMAGE = WINDOWED | {"GlobalAveragePool"}


class Lowering(Grids):
    """Puts nodes down as operations, one segment at a time.

    Attributes:
        segment: what is being put down.
        shapes: of every value that is not known yet, the batch first.
        values: what the segment has of them so far.
        work: multiply-adds of the products, in those that a dense kernel would do in the same time.
        dense_work: multiply-adds of a dense kernel for the same products.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        known: Known,
        lanes: int,
        split: int,
        packs: MutableMapping[Any, Pack],
        rules: Mapping[str, Rule],
    ) -> None:
        super().__init__(nodes, known, lanes)
        self.split = split
        self.packs, self._rules = packs, rules
        self.work, self.dense_work = 0.0, 0.0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.values: dict[str, Value] = {}
        self.segment = Segment(lanes, 1)
        self.types: dict[str, Any] = {}
        self._readers: dict[str, list[int]] = {}
        for i, node in enumerate(nodes):
            for name in node.inputs:
                self._readers.setdefault(name, []).append(i)

    def begin(self, name: str, shape: tuple[int, ...], output: str) -> None:
        """Say what the input is, and which value is asked for."""
        self.images = shape[0]
        self.start(self.images)
        self.shapes[name] = shape
        self._readers.setdefault(output, []).append(len(self.nodes))

    def alive(self, index: int) -> list[str]:
        """Values of this segment that nodes from `index` on read."""
        made = [name for name in self.values if name not in self.segment.inputs]
        return [name for name in made if self._readers.get(name, [-1])[-1] >= index]

    def finished(self, index: int) -> list[str]:
        """Values that the node at `index` is the last to read."""
        return [name for name in self.nodes[index].inputs if name and self._readers[name][-1] == index]

    def start(self, batch: int | None = None) -> None:
        """Begin a new segment: what was made before comes back as arrays.

        Args:
            batch: how often it runs, each time on the next piece of every array: once for each image, or once for
                rows that are all alike; as before when absent.
        """
        self.segment = Segment(self.lanes, self.segment.batch if batch is None else batch)
        self.values = {}

    @property
    def batch(self) -> int:
        """How often the segment runs."""
        return self.segment.batch

    def batch_of(self, index: int) -> int | None:
        """How often a segment with this node should run; None where that does not matter."""
        node = self.nodes[index]
        rank = len(self.shapes.get(node.inputs[0], ())) if node.inputs else 0
        if node.op in _BY_ROW and rank:
            return 1
        return self.images if node.op in _BY_IMAGE and rank == 4 else None

    def lower(self, index: int) -> Fallback | None:
        """Lowers one node. Returns None, or a fallback that says why no kernel computes the node."""
        node = self.nodes[index]
        rule = self._rules.get(node.op)
        if rule is None:
            return Fallback(node.op, node.outputs[0], "no kernel")
        self.index = index
        # A rule may add ops and values before it finds that it cannot go on; all of them are removed then.
        count, before = len(self.segment.ops), (dict(self.values), dict(self.segment.inputs))
        reason = "declined"
        try:
            lowered = rule(self, node, **node.attributes)
        except DsrError:
            lowered = None  # the node is invalid, and the reference says what is wrong with it
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            # Either the node is invalid, or the rule has a bug. A model must run in both cases, so this is a fallback;
            # it is told apart from a form that has no kernel, so that tests can fail and `bench` can name it.
            lowered, reason = None, describe_failure(error)
        if lowered is None:
            del self.segment.ops[count:]
            self.values, self.segment.inputs = before
            return Fallback(node.op, node.outputs[0], reason)
        self.values[node.outputs[0]], self.shapes[node.outputs[0]] = lowered
        return None

    def array(self, name: str) -> Flat:
        """A value as an array of the caller: filled from here when it is made here, else read."""
        value = self.values.get(name)
        if name in self.segment.inputs:
            return self.segment.inputs[name]
        if name in self.segment.outputs:
            return self.segment.outputs[name]
        out = Flat(self.shapes[name], self.lanes, self.batch)
        if value is None:
            self.segment.inputs[name] = out
            self.values[name] = out
        elif isinstance(value, Flat) and self._exact(value):
            value.shape = self.shapes[name]
            self.segment.outputs[name] = out = value
        else:
            self.segment.outputs[name] = out
            self.segment.add(copied(value, out))
        return out

    def _exact(self, value: Flat) -> bool:
        """Whether a value may lie in an array of the caller: whoever makes it writes its entries and no more."""
        maker = self.segment.maker(value)
        taken = value in self.segment.outputs.values()
        # Others read whole vectors, past the end of an array.
        readers = [op for op in self.segment.ops if value in (op.source, op.other)]
        return maker is not None and all(op.kind in _EXACT for op in (maker, *readers)) and not taken

    # --- what rules ask for -------------------------------------------------------------------------

    def value(self, name: str) -> Value | None:
        """What is at hand of a float value of the graph."""
        if name in self.values:
            return self.values[name]
        # Operations run once for each of the batch, whatever the first axis means.
        if (
            not self.shapes.get(name)
            or 0 in self.shapes[name]
            or (self.batch > 1 and self.shapes[name][0] != self.batch)
            or self.types.get(name, np.float32) != np.float32
        ):
            return None
        return self.array(name)

    def planes(self, name: str) -> Planes | None:
        """A value as planes."""
        value = self.value(name)
        if isinstance(value, Rows):
            value = self.flat(name)
        if isinstance(value, Planes) or value is None:
            return value
        shape = self.shapes[name]
        if len(shape) != 4 or shape[2] * shape[3] > MAX_PLACES or self.batch != shape[0]:
            return None
        grid, factor = self.grid_for(name, shape[2], shape[3])
        planes = Planes(shape, grid, factor)
        if not planes.reach(0, 0):
            return None
        self.segment.add(loaded(value, planes))
        self.values[name] = planes
        return planes

    def rows(self, name: str) -> Rows | None:
        """A value as rows of features, its last axis."""
        value = self.value(name)
        if isinstance(value, Rows):
            return value
        flat, shape = self.flat(name), self.shapes.get(name, ())
        if flat is None or self.batch != 1 or math.prod(shape) > MAX_PLACES:
            return None
        features, count = shape[-1], math.prod(shape[:-1])
        out = Rows((1, features, 1, count), self.grid(1, count, 0), 1)
        self.segment.add(Op(Kind.FROM_ROWS, flat, out, finish=rowwise(features, count)))
        self.values[name] = out
        return out

    def flat(self, name: str) -> Flat | None:
        """A value as a row of entries."""
        value = self.value(name)
        if isinstance(value, Flat) or value is None:
            return value
        out = Flat(self.shapes[name], self.lanes, self.batch)
        self.segment.add(copied(value, out))
        return out

    def moved(self, source: Planes, grid: Grid, factor: int) -> Planes:
        """The same pixels on another grid."""
        out = Planes(source.shape, grid, factor)
        out.positive = source.positive
        self.segment.add(regridded(source, out, 1))
        return out

    def only_here(self, name: str) -> bool:
        """Whether one node alone reads a value."""
        return len(self._readers.get(name, ())) == 1


def packable(weight: Weight) -> bool:
    """Whether kernels can multiply by a weight: by its type, and neither empty nor too large for its shape."""
    dtype = weight.values.dtype if isinstance(weight, SparseTensor) else weight.dtype
    return dtype == np.float32 and 0 < math.prod(shape_of(weight)) < _MOST_ENTRIES
