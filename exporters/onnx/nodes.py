"""Small computations as nested expressions: written into an ONNX graph, and found again in one.

An expression is an operator with its arguments, `("CumSum", ("ToIndex", "steps"), "axis")`; a word by itself is a leaf,
an initializer. Each form of a weight is one expression, so the writer and the reader cannot disagree about it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from onnx import NodeProto, SparseTensorProto, TensorProto, helper, numpy_helper

from dsr_tool.sparsity.tensor import Array

__all__ = ["Expression", "Match", "NodeWriter", "field_bytes", "initializer_bytes", "match"]

Expression: TypeAlias = "str | tuple[Expression, ...]"

_CASTS = {"ToFloat": TensorProto.FLOAT, "ToDouble": TensorProto.DOUBLE, "ToIndex": TensorProto.INT32}
"""Operators of expressions that stand for a Cast, with the type to cast to."""
_SHARED = "shared"
"""First part of the names of what several weights may share."""


def field_bytes(message: NodeProto | TensorProto | SparseTensorProto) -> int:
    """Counts the bytes of a message in a repeated field of its graph."""
    return _with_header(message.ByteSize())


def initializer_bytes(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    """Counts the bytes of an initializer in its graph without making it."""
    proto = TensorProto(name=name, dims=shape, data_type=helper.np_dtype_to_tensor_dtype(dtype))
    return _with_header(proto.ByteSize() + _with_header(math.prod(shape) * dtype.itemsize))


def _with_header(size: int) -> int:
    """Counts the bytes of a field: its content, one byte of tag, and the content's length in groups of 7 bits."""
    # 2 for the tag and the first group of the length; every further group of 7 bits takes one byte more.
    return size + 2 + (max(size.bit_length(), 1) - 1) // 7


class NodeWriter:
    """Collects nodes and initializers; parts that several expressions share are written once.

    Every node and value has a name that other tools can refer to: the result that it belongs to, or `shared`, and its
    leaf or operator, such as `conv1.weight/values`. The bytes of a weight do not depend on its place in the file.

    Attributes:
        nodes: nodes in the order of computation.
        initializers: initializers in the order of their first use.
        nbytes: bytes of both in a file.
        shared_bytes: bytes of those that several expressions may share.
    """

    def __init__(self, taken: Collection[str] = ()) -> None:
        """Starts without nodes; inner values get names that are not `taken`."""
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []
        self.nbytes = self.shared_bytes = 0
        self._written: dict[tuple[object, ...], str] = {}
        self._taken = frozenset(taken)
        self._common: set[str] = set()
        self._numbers: Counter[str] = Counter()

    def add(self, expression: Expression, own: Mapping[str, Array], shared: Mapping[str, Array], output: str) -> None:
        """Writes the nodes that compute an expression.

        Args:
            expression: the computation.
            own: arrays of leaves that nothing else reads.
            shared: arrays of the other leaves; equal arrays become one initializer, unused ones none.
            output: name of the result.
        """
        # Never shared, even if two are equal: the bytes of a weight must not depend on other weights.
        leaves = {leaf: self.initializer(array, self._name(output, leaf)) for leaf, array in own.items()}
        self._value(expression, leaves, shared, output)

    def initializer(self, array: Array, name: str) -> str:
        """Adds an array under a name; returns the name."""
        tensor = numpy_helper.from_array(array, name)
        self.initializers.append(tensor)
        self.nbytes += field_bytes(tensor)
        return name

    def cast(self, cast: str, output: str) -> str:
        """Adds a cast that makes `output`; returns the name that its input, of another type, must have."""
        source = self._name(output, "stored")
        self._node(cast, [source], output, self._name(output, cast))
        return source

    def _shared(self, leaf: str, array: Array) -> str:
        key = (array.dtype.str, array.shape, array.tobytes())
        return self._once(key, lambda: self.initializer(array, self._name(_SHARED, leaf)), common=True)

    def _value(
        self,
        expression: Expression,
        leaves: Mapping[str, str],
        shared: Mapping[str, Array],
        output: str,
        *,
        inner: bool = False,
    ) -> str:
        if isinstance(expression, str):
            return leaves[expression] if expression in leaves else self._shared(expression, shared[expression])
        operator = str(expression[0])
        # Nodes are keyed by operator and inputs, so common subexpressions of several weights are written once.
        inputs = [self._value(argument, leaves, shared, output, inner=True) for argument in expression[1:]]
        common = inner and self._common.issuperset(inputs)

        def make() -> str:
            name = self._name(_SHARED if common else output, operator)
            return self._node(operator, inputs, name if inner else output, name)

        return self._once((operator, *inputs), make, common=common)

    def _name(self, of: str, part: str) -> str:
        """Returns the next free name of a part, such as `conv1.weight/Add_2`."""
        base, name = f"{of}/{part}", ""
        while not name or name in self._taken:
            self._numbers[base] += 1
            # Those of shared parts all have a number, of one length, since weights refer to them.
            number = f"_{self._numbers[base]:02}" if of == _SHARED else f"_{self._numbers[base]}"
            name = base if number == "_1" else base + number
        return name

    def _node(self, operator: str, inputs: list[str], output: str, name: str) -> str:
        if operator in _CASTS:
            node = helper.make_node("Cast", inputs, [output], name, to=_CASTS[operator])
        else:
            node = helper.make_node(operator, inputs, [output], name)
        self.nodes.append(node)
        self.nbytes += field_bytes(node)
        return output

    def _once(self, key: tuple[object, ...], make: Callable[[], str], *, common: bool) -> str:
        """Writes a part that was not written yet; returns the name of its value."""
        if key not in self._written:
            before = self.nbytes
            self._written[key] = make()
            if common:
                self.shared_bytes += self.nbytes - before
                self._common.add(self._written[key])
        return self._written[key]


@dataclass(frozen=True)
class Match:
    """An expression found in a graph.

    Attributes:
        leaves: name of the initializer of each leaf.
        steps: names of all values that its nodes make, as the keys of an ordered set.
    """

    leaves: dict[str, str] = field(default_factory=dict)
    steps: dict[str, None] = field(default_factory=dict)


def match(
    expression: Expression, value: str, nodes: Mapping[str, NodeProto], initializers: Collection[str]
) -> Match | None:
    """Matches an expression with the nodes that make a value; None if they compute something else.

    Args:
        expression: the expression to look for.
        value: name of a value of the graph.
        nodes: every node by the first value that it makes.
        initializers: names of all initializers.
    """
    found = Match()
    # One object collects the leaves of all branches; if the match fails, it is dropped with whatever it holds.
    return found if _fits(expression, value, nodes, initializers, found) else None


def _fits(
    expression: Expression,
    value: str,
    nodes: Mapping[str, NodeProto],
    initializers: Collection[str],
    found: Match,
) -> bool:
    if isinstance(expression, str):
        # A leaf that occurs twice in an expression must be the same initializer both times.
        return value in initializers and found.leaves.setdefault(expression, value) == value
    node = nodes.get(value)
    if node is None or len(node.input) != len(expression) - 1 or not _computes(node, str(expression[0])):
        return False
    found.steps[value] = None
    return all(
        _fits(argument, name, nodes, initializers, found)
        for argument, name in zip(expression[1:], node.input, strict=True)
    )


def _computes(node: NodeProto, operator: str) -> bool:
    """Tells whether a node is the operator, with exactly the attributes that `NodeWriter` gives it."""
    # An operator of the same name in another domain may compute anything.
    if node.domain not in ("", "ai.onnx"):
        return False
    attributes = [(attribute.name, attribute.i) for attribute in node.attribute]
    if operator in _CASTS:
        return node.op_type == "Cast" and attributes == [("to", _CASTS[operator])]
    return node.op_type == operator and not attributes
