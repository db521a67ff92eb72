"""The graph: the computation of a model as nodes with operators of the ONNX standard.

A graph names its weights but does not hold them. They come from an archive or a model folder, under their state_dict
names. Constants that belong to the computation, such as shapes and index tables, are part of the graph.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dsr_tool.errors import FormatError
from dsr_tool.sparsity.tensor import Array

__all__ = ["Attribute", "Graph", "Node", "Value"]

Attribute = int | float | str | tuple[int, ...] | tuple[float, ...] | tuple[str, ...]

_WORD = re.compile(r"[A-Za-z]\w{0,79}", re.ASCII)
"""A valid name of an operator or attribute."""
_TYPES = ("bool", "int32", "int64", "uint8", "float16", "float32", "float64")
"""Numpy names of the types that inputs, outputs and constants may have."""


@dataclass(frozen=True)
class Value:
    """An input or output of a graph.

    Attributes:
        name: its name in the graph.
        shape: its dimensions; None for one of any size, such as the batch.
        dtype: numpy name of its type.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str = "float32"


@dataclass(frozen=True)
class Node:
    """One operator of the standard ONNX domain.

    Attributes:
        op: name of the operator (`Conv`).
        inputs: names of the values that it reads; an empty string for an optional input that is absent.
        outputs: names of the values that it makes; an empty string for one that nothing reads.
        attributes: integers, floats, strings, or tuples of one of these types, by name.
    """

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Attribute] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Graph:
    """A computation in topological order.

    Attributes:
        inputs: values that the caller gives; their first axis is the batch.
        outputs: values that the graph returns.
        nodes: nodes in topological order: each stands after the nodes that make its inputs.
        constants: small arrays that belong to the computation, by name.
        parameters: state_dict names of the weights that the nodes read.
        opset: version of the ONNX operator set that defines the operators.
    """

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    nodes: tuple[Node, ...]
    constants: Mapping[str, Array]
    parameters: tuple[str, ...]
    opset: int

    def to_json(self) -> str:
        """Returns the graph as JSON, the same bytes for the same graph; `docs/format.md` describes the document."""
        return json.dumps(
            {
                "opset": self.opset,
                "inputs": [_value_to_dict(value) for value in self.inputs],
                "outputs": [_value_to_dict(value) for value in self.outputs],
                "parameters": list(self.parameters),
                "constants": {name: _array_to_dict(self.constants[name]) for name in sorted(self.constants)},
                "nodes": [_node_to_dict(node) for node in self.nodes],
            },
            separators=(",", ":"),
            allow_nan=False,  # NaN is not JSON; constants are base64, so only attributes could hold one
        )

    @classmethod
    def from_json(cls, text: str) -> Graph:
        """Reads what `to_json` wrote, and checks it.

        Raises:
            FormatError: the document is not a graph, or the graph is invalid (see `check`).
        """
        try:
            data = json.loads(text)
            graph = cls(
                inputs=tuple(_value_from_dict(value) for value in data["inputs"]),
                outputs=tuple(_value_from_dict(value) for value in data["outputs"]),
                nodes=tuple(_node_from_dict(node) for node in data["nodes"]),
                constants={str(name): _array_from_dict(array) for name, array in data["constants"].items()},
                parameters=tuple(str(name) for name in data["parameters"]),
                opset=int(data["opset"]),
            )
        # RecursionError: JSON nested a thousand deep; AttributeError: a list where a mapping should be.
        except (ArithmeticError, AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise FormatError(f"the graph cannot be read ({repr(error)[:200]}); the file is damaged.") from error
        graph.check()
        return graph

    def check(self) -> None:
        """Raises `FormatError` unless every value is made once, before it is read, and has a valid type and size.

        Each output is listed once, since callers get outputs by name.
        """
        if not self.inputs or not self.outputs:
            raise FormatError("the graph has no input or no output; the file is damaged.")
        self._check_values()
        # Names come from files of unknown origin and may be of any length, so messages cut them.
        known = {value.name for value in self.inputs} | set(self.constants) | set(self.parameters)
        for node in self.nodes:
            if not all(_WORD.fullmatch(word) for word in (node.op, *node.attributes)) or not any(node.outputs):
                raise FormatError(f"node {node.op[:80]!r} has no output, or an invalid operator or attribute name.")
            missing = [name for name in node.inputs if name and name not in known]
            if missing:
                raise FormatError(f"a node {node.op} reads {missing[0][:80]!r}, which no node before it makes.")
            for name in node.outputs:
                if name in known:
                    raise FormatError(f"value {name[:80]!r} of node {node.op} is made twice.")
                if name:
                    known.add(name)
        listed: set[str] = set()
        for value in self.outputs:
            if value.name not in known:
                raise FormatError(f"output {value.name[:80]!r} is made by no node.")
            if value.name in listed:
                raise FormatError(f"output {value.name[:80]!r} is listed twice.")
            listed.add(value.name)

    def _check_values(self) -> None:
        """Raises `FormatError` if an input, output or constant has an invalid type or size."""
        for value in (*self.inputs, *self.outputs):
            _check_type(f"value {value.name[:80]!r}", value.dtype)
            if any(n is not None and n < 0 for n in value.shape):
                raise FormatError(f"value {value.name[:80]!r} has a negative size; the file is damaged.")
        for name, array in self.constants.items():
            _check_type(f"constant {name[:80]!r}", array.dtype.name)

    def users(self) -> dict[str, list[Node]]:
        """Returns the nodes that read each value, by the value's name."""
        users: dict[str, list[Node]] = {}
        for node in self.nodes:
            # A node that reads a value twice, such as x * x, is one reader.
            for name in dict.fromkeys(node.inputs):
                users.setdefault(name, []).append(node)
        return users

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)


def _check_type(what: str, dtype: str) -> None:
    if dtype not in _TYPES:
        raise FormatError(f"{what} is of type {dtype[:20]!r}, not one of {', '.join(_TYPES)}.")


def _value_to_dict(value: Value) -> dict[str, Any]:
    return {"name": value.name, "shape": list(value.shape), "dtype": value.dtype}


def _value_from_dict(data: dict[str, Any]) -> Value:
    shape = tuple(None if n is None else int(n) for n in data["shape"])
    return Value(str(data["name"]), shape, str(data["dtype"]))


def _node_to_dict(node: Node) -> dict[str, Any]:
    data: dict[str, Any] = {"op": node.op, "inputs": list(node.inputs), "outputs": list(node.outputs)}
    if node.attributes:
        data["attributes"] = {name: node.attributes[name] for name in sorted(node.attributes)}
    return data


def _node_from_dict(data: dict[str, Any]) -> Node:
    return Node(
        str(data["op"]),
        tuple(str(name) for name in data["inputs"]),
        tuple(str(name) for name in data["outputs"]),
        {str(name): _attribute(value) for name, value in data.get("attributes", {}).items()},
    )


def _attribute(value: Any) -> Attribute:
    if isinstance(value, (int, float, str)):
        return value
    # Anything that is not a list becomes a list that no type accepts, for one error message below.
    items: Sequence[Any] = value if isinstance(value, list) else [None]
    for kind in (int, float, str):
        if all(isinstance(item, kind) for item in items):
            return tuple(items)
    raise FormatError(f"attribute value {str(value)[:60]!r} is not a number, a string or a list of one of them.")


def _array_to_dict(array: Array) -> dict[str, Any]:
    # Little-endian on every machine, so that the same graph gives the same bytes.
    little = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False)
    data = base64.b64encode(little.tobytes()).decode("ascii")
    return {"dtype": array.dtype.name, "shape": list(array.shape), "data": data}


def _array_from_dict(data: dict[str, Any]) -> Array:
    dtype, shape = str(data["dtype"]), tuple(int(n) for n in data["shape"])
    _check_type("a constant", dtype)
    # Without validate, b64decode skips characters that are not of its alphabet.
    raw = base64.b64decode(data["data"], validate=True)
    if min(shape, default=0) < 0 or len(raw) != math.prod(shape) * np.dtype(dtype).itemsize:
        raise FormatError(f"a constant of shape {str(shape)[:80]} and type {dtype} cannot have {len(raw)} bytes.")
    return np.frombuffer(raw, np.dtype(dtype).newbyteorder("<")).astype(dtype).reshape(shape)
