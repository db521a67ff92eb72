"""Capture of a torch module as a graph of standard ONNX operators that names its weights."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import nn

from dsr_tool.errors import UsageError
from dsr_tool.graph.ir import Attribute, Graph, Node, Value
from dsr_tool.graph.operators import operator_of
from dsr_tool.sparse.capture import INPUT, OUTPUT, capture
from dsr_tool.sparsity.tensor import Array

__all__ = ["trace"]

_ONE = np.ones(1)
_ATTRIBUTES: dict[str, Any] = {"INT": int, "FLOAT": float, "STRING": str}


def trace(module: nn.Module, input_shape: tuple[int, ...]) -> Graph:
    """The computation of `module` in eval mode, with parameters under their state_dict names.

    Only what the output depends on appears: no auxiliary heads, no counters. The module, its training flags
    and torch's random state stay as they are; a module on another device is captured on the CPU.

    Args:
        module: takes a tensor (batch, *input_shape) and returns one, or a mapping with the key `out`.
        input_shape: dimensions of one input, without the batch.

    Raises:
        UsageError: no input shape; torch cannot capture the module or not with this shape; the module returns
            several tensors, or needs an operator outside the ONNX standard.
    """
    name = type(module).__name__
    if not input_shape or min(input_shape) < 1:
        raise UsageError(
            f"input shape {tuple(input_shape)} of {name} is not allowed; give the positive dimensions of one "
            f"input, as in (3, 224, 224)."
        )
    state = _first_names(module)
    if reserved := state.keys() & {INPUT, OUTPUT}:
        raise UsageError(f"{name} has a parameter named {min(reserved)!r}, a name kept for the graph; rename it.")
    return _Reader(capture(module, tuple(input_shape)), state, name).graph()


def _first_names(module: nn.Module) -> dict[str, str]:
    """For each state_dict entry, the first one that is the same tensor: tied weights go by one name."""
    first: dict[int, str] = {}
    state = module.state_dict(keep_vars=True)
    return {name: first.setdefault(id(tensor), name) for name, tensor in state.items()}


class _Reader:
    """Reads an `onnx_ir` model into a `Graph`; names of inner values count the operators (`conv_0`)."""

    def __init__(self, model: Any, state: Mapping[str, str], module: str) -> None:
        self._model, self._state, self._module = model, state, module
        self._nodes: list[Node] = []
        self._constants: dict[str, Array] = {}
        self._parameters: dict[str, None] = {}
        self._names: dict[str, str] = {}
        self._arrays: dict[str, Array] = {}
        self._by_content: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._counters: dict[str, Iterator[int]] = {}

    def graph(self) -> Graph:
        """Read everything."""
        source = self._model.graph
        for name, value in source.initializers.items():
            if name not in self._state:
                self._arrays[name] = value.const_value.numpy()
        (given, *_), (result,) = source.inputs, source.outputs
        self._names[given.name] = INPUT
        for node in source:
            self._read(node, result.name)
        if self._names.get(result.name) != OUTPUT:
            self._nodes.append(Node("Identity", (self._use(result),), (OUTPUT,)))
        used = {name for node in self._nodes for name in node.inputs}
        return Graph(
            (Value(INPUT, (None, *_shape(given)[1:]), given.dtype.numpy().name),),
            (Value(OUTPUT, (None, *_shape(result)[1:]), result.dtype.numpy().name),),
            tuple(self._nodes),
            {name: array for name, array in self._constants.items() if name in used},
            tuple(self._parameters),
            int(self._model.opset_imports[""]),
        )

    def _read(self, node: Any, result: str) -> None:
        if node.domain not in ("", "ai.onnx"):
            raise self._not_allowed(f"{node.domain}.{node.op_type}")
        if node.op_type == "Constant":
            self._arrays[node.outputs[0].name] = _constant(node)
            return
        if operator_of(node.op_type).identity:
            source, name = node.inputs[0].name, node.outputs[0].name
            if source in self._arrays:
                self._arrays[name] = self._arrays[source]
            else:
                self._names[name] = self._use(node.inputs[0])
            return
        op, inputs, attributes = self._plain(node, [self._use(value) for value in node.inputs])
        outputs = [self._make(op, value, result) for value in node.outputs]
        self._nodes.append(Node(op, _strip(inputs), _strip(outputs), attributes))

    def _plain(self, node: Any, inputs: list[str]) -> tuple[str, list[str], dict[str, Attribute]]:
        """Operator, inputs and attributes, in the simpler of two forms where there are two."""
        op = node.op_type
        if op == "ConstantOfShape":
            # Its value is an array, which attributes cannot hold; spreading a constant says the same.
            filler = _constant(node) if node.attributes else np.zeros(1, np.float32)
            return "Expand", [self._constant(filler), *inputs], {}
        if op == "Reshape" and _shape(node.inputs[0]) == () and self._constants.get(inputs[1], _ONE).tolist() == [-1]:
            # Shape inference follows a number through this operator, but not through a reshape.
            return "Unsqueeze", [inputs[0], self._constant(np.zeros(1, np.int64))], {}
        if op == "Conv" and inputs[2:] and not self._constants.get(inputs[2], _ONE).any():
            inputs = inputs[:2]  # torch writes a bias of zeros where there is none
        return op, inputs, {name: self._attribute(node, attr) for name, attr in node.attributes.items()}

    def _use(self, value: Any) -> str:
        """Name of a value that something reads."""
        if value is None or value.name == "":
            return ""
        if value.name in self._state:
            name = self._state[value.name]
            self._parameters[name] = None
            return name
        if value.name in self._arrays:
            return self._constant(self._arrays[value.name])
        return self._names[value.name]

    def _make(self, op: str, value: Any, result: str) -> str:
        """Name of a value that a node makes; none where nothing reads it, but for pieces of a split."""
        if not value.name or not (value.uses() or value.name == result or operator_of(op).all_outputs):
            return ""
        self._names[value.name] = OUTPUT if value.name == result else self._fresh(op.lower())
        return self._names[value.name]

    def _constant(self, array: Array) -> str:
        key = (array.dtype.name, array.shape, array.tobytes())
        if key not in self._by_content:
            self._by_content[key] = self._fresh("constant")
            self._constants[self._by_content[key]] = array
        return self._by_content[key]

    def _fresh(self, stem: str) -> str:
        counter = self._counters.setdefault(stem, itertools.count())
        return next(name for name in (f"{stem}_{i}" for i in counter) if name not in self._state)

    def _attribute(self, node: Any, attr: Any) -> Attribute:
        kind = _ATTRIBUTES.get(attr.type.name.removesuffix("S"))
        if kind is None:
            raise self._not_allowed(f"{node.op_type} with {attr.name} of type {attr.type.name}")
        value: Attribute = tuple(map(kind, attr.value)) if attr.type.name.endswith("S") else kind(attr.value)
        return value

    def _not_allowed(self, operator: str) -> UsageError:
        return UsageError(
            f"{self._module} needs operator {operator}, which is not a plain one of the ONNX standard; "
            f"replace that layer by one that torch exports with standard operators."
        )


def _constant(node: Any) -> Array:
    """The only attribute of the node, as an array."""
    (attr,) = node.attributes.values()
    if attr.name == "value":
        return np.asarray(attr.value.numpy())
    return np.asarray(attr.value, np.float32 if "float" in attr.name else np.int64)


def _shape(value: Any) -> tuple[int | None, ...]:
    """Dimensions, None where free; of a value whose rank is unknown, the batch alone."""
    return tuple(n if isinstance(n, int) else None for n in ((None,) if value.shape is None else value.shape))


def _strip(names: list[str]) -> tuple[str, ...]:
    """Without the absent ones at the end."""
    while names and not names[-1]:
        names = names[:-1]
    return tuple(names)
