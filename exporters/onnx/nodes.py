"""Small computations as nested expressions: written into an ONNX graph, and found again in one.

An expression is an operator with its arguments, `("CumSum", ("ToIndex", "steps"), "axis")`; a word by itself is a leaf,
an initializer. Each way of storing a weight is one expression, which the writer and the reader share.
"""

from __future__ import annotations

import itertools
import math
import string
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from onnx import NodeProto, SparseTensorProto, TensorProto, helper, numpy_helper

from dsr_tool.sparsity.tensor import Array

__all__ = ["Expression", "Match", "NodeWriter", "field_bytes", "initializer_bytes", "match"]

Expression: TypeAlias = "str | tuple[Expression, ...]"

_CASTS = {"ToFloat": TensorProto.FLOAT, "ToDouble": TensorProto.DOUBLE, "ToIndex": TensorProto.INT32}
_NAME_LENGTH = 3  # always the same, so that what a weight takes does not depend on its place in the file


def field_bytes(message: NodeProto | TensorProto | SparseTensorProto) -> int:
    """Bytes of a message in a repeated field of its graph."""
    return _with_header(message.ByteSize())


def initializer_bytes(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    """Bytes of an initializer in its graph, without making it."""
    proto = TensorProto(name=name, dims=shape, data_type=helper.np_dtype_to_tensor_dtype(dtype))
    return _with_header(proto.ByteSize() + _with_header(math.prod(shape) * dtype.itemsize))


def _with_header(size: int) -> int:
    """Bytes of a field: its content, one byte of tag, and the length of the content in groups of 7 bits."""
    return size + 2 + (max(size.bit_length(), 1) - 1) // 7


class NodeWriter:
    """Collects nodes and initializers; what several expressions share stands in the file once.

    Attributes:
        nodes: in the order of computation.
        initializers: in the order of their first use.
        nbytes: what both take in a file.
    """

    def __init__(self, taken: Collection[str] = ()) -> None:
        """Start empty; inner values get short names that are not `taken`."""
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []
        self.nbytes = 0
        self._made: dict[tuple[object, ...], str] = {}
        self._names = _short_names(taken)

    def add(self, expression: Expression, own: Mapping[str, Array], shared: Mapping[str, Array], output: str) -> None:
        """Make the value `output`.

        Args:
            expression: what to compute.
            own: arrays of leaves that nothing else reads.
            shared: arrays of the other leaves; equal ones become one initializer, and what is not used none.
            output: name of the value.
        """
        leaves = {leaf: self.initializer(array) for leaf, array in own.items()}
        self._value(expression, leaves, shared, output)

    def initializer(self, array: Array, name: str = "") -> str:
        """Add an array, under a short name unless one is given."""
        name = name or next(self._names)
        tensor = numpy_helper.from_array(array, name)
        self.initializers.append(tensor)
        self.nbytes += field_bytes(tensor)
        return name

    def cast(self, cast: str, output: str) -> str:
        """Make the value `output` out of one of another type; returns the name that this one has to have."""
        source = next(self._names)
        self._node(cast, [source], output)
        return source

    def _shared(self, array: Array) -> str:
        return self._once((array.dtype.str, array.shape, array.tobytes()), lambda: self.initializer(array))

    def _value(
        self, expression: Expression, leaves: Mapping[str, str], shared: Mapping[str, Array], output: str = ""
    ) -> str:
        if isinstance(expression, str):
            return leaves[expression] if expression in leaves else self._shared(shared[expression])
        operator = str(expression[0])
        inputs = [self._value(argument, leaves, shared) for argument in expression[1:]]
        return self._once((operator, *inputs), lambda: self._node(operator, inputs, output or next(self._names)))

    def _node(self, operator: str, inputs: list[str], output: str) -> str:
        if operator in _CASTS:
            node = helper.make_node("Cast", inputs, [output], to=_CASTS[operator])
        else:
            node = helper.make_node(operator, inputs, [output])
        self.nodes.append(node)
        self.nbytes += field_bytes(node)
        return output

    def _once(self, key: tuple[object, ...], make: Callable[[], str]) -> str:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def _short_names(taken: Collection[str]) -> Iterator[str]:
    letters = itertools.product(string.ascii_letters + string.digits, repeat=_NAME_LENGTH)
    return (name for name in map("".join, letters) if name not in taken)


@dataclass(frozen=True)
class Match:
    """An expression found in a graph.

    Attributes:
        leaves: name of the initializer of each leaf.
        steps: names of all values that its nodes make.
    """

    leaves: dict[str, str] = field(default_factory=dict)
    steps: dict[str, None] = field(default_factory=dict)


def match(
    expression: Expression, value: str, nodes: Mapping[str, NodeProto], initializers: Collection[str]
) -> Match | None:
    """The expression in the nodes that make `value`, or None when they compute something else.

    Args:
        expression: what to look for.
        value: name of a value of the graph.
        nodes: every node by the first value that it makes.
        initializers: names of all initializers.
    """
    found = Match()
    return found if _fits(expression, value, nodes, initializers, found) else None


def _fits(
    expression: Expression,
    value: str,
    nodes: Mapping[str, NodeProto],
    initializers: Collection[str],
    found: Match,
) -> bool:
    if isinstance(expression, str):
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
    """Whether a node is that operator, with the attributes that `NodeWriter` gives it and no others."""
    if node.domain not in ("", "ai.onnx"):
        return False
    attributes = [(attribute.name, attribute.i) for attribute in node.attribute]
    if operator in _CASTS:
        return node.op_type == "Cast" and attributes == [("to", _CASTS[operator])]
    return node.op_type == operator and not attributes
