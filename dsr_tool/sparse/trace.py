"""Traces a torch module into a graph of standard ONNX operators whose weights have their state_dict names."""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from dsr_tool.errors import UsageError
from dsr_tool.graph.ir import Attribute, Graph, Node, Value
from dsr_tool.graph.operators import operator_of
from dsr_tool.sparse.aliases import later_names
from dsr_tool.sparse.capture import capture
from dsr_tool.sparse.compact.change import held_state
from dsr_tool.sparse.feeding import INPUT
from dsr_tool.sparsity.tensor import Array

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["trace"]

_ONE = np.ones(1)
"""Stands for an input that is no constant, where only [-1] or zeros would be simplified."""
_SCALARS: dict[str, type[int] | type[float] | type[str]] = {"INT": int, "FLOAT": float, "STRING": str}
"""Python type of a node's attribute, by its ONNX type; lists of these are allowed as well, and nothing else."""


def trace(module: nn.Module, input_shape: tuple[int, ...]) -> Graph:
    """Returns the computation of a module in eval mode, with parameters under their state_dict names.

    The graph has only the nodes that the outputs depend on: no auxiliary heads, no counters. The module, its training
    flags and torch's random state do not change. A module on another device is captured on the CPU.

    Args:
        module: takes a tensor of shape (batch, *input_shape), and returns tensors in any containers, which are the
            outputs by `named_floats`; or a detector of torchvision, whose `graph_form` is captured.
        input_shape: shape of one input, without the batch dimension.

    Raises:
        UsageError: the input shape is missing, torch cannot capture the module with it, the module returns no real
            numbers, or it needs an operator that is not in the ONNX standard.
    """
    name = type(module).__name__
    if not input_shape or min(input_shape) < 1:
        raise UsageError(
            f"input shape {tuple(input_shape)} of {name} is not allowed; give the positive dimensions of one "
            f"input, e.g. (3, 224, 224)."
        )
    state = _first_names(module)
    # torch fails at a parameter with the name of the input; names of outputs are known once it has captured them.
    _refuse_reserved(name, state, (INPUT,))
    captured, outputs = capture(module, tuple(input_shape))
    _refuse_reserved(name, state, outputs)
    return _Reader(captured, outputs, state, name).graph()


def _refuse_reserved(network: str, state: Container[str], names: Iterable[str]) -> None:
    """Raises `UsageError` if a parameter has the name of an input or output."""
    taken = next((name for name in names if name in state), None)
    if taken is not None:
        raise UsageError(f"{network} has a parameter named {taken!r}, a name of the graph itself; rename it.")


def _first_names(module: nn.Module) -> dict[str, str]:
    """Returns for each state_dict entry the first name of the same tensor: tied weights have one name in the graph."""
    return {name: name for name, *_ in held_state(module)} | later_names(module)


class _Reader:
    """Converts an `onnx_ir` model to a `Graph`. Inner values are named by operator and number (`conv_0`)."""

    def __init__(self, model: onnx_ir.Model, outputs: Sequence[str], state: Mapping[str, str], module: str) -> None:
        """Takes the model, its outputs' names, those of `_first_names`, and that of the module's class for messages."""
        self._model, self._outputs, self._state, self._module = model, outputs, state, module
        # A value that is returned twice is made under the first name, and copied to the second.
        pairs = zip(model.graph.outputs, outputs, strict=True)
        self._taken = {INPUT, *outputs, *state}
        self._results = {_name(value): output for value, output in reversed(list(pairs))}
        self._nodes: list[Node] = []
        self._constants: dict[str, Array] = {}
        self._parameters: dict[str, None] = {}
        self._names: dict[str, str] = {}
        self._arrays: dict[str, Array] = {}
        self._by_content: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._counters: dict[str, Iterator[int]] = {}

    def graph(self) -> Graph:
        """Converts the whole model."""
        source = self._model.graph
        for name, value in source.initializers.items():
            if name not in self._state and value.const_value is not None:
                self._arrays[name] = value.const_value.numpy()
        image, *_ = source.inputs
        self._names[_name(image)] = INPUT
        for node in source:
            self._read(node)
        results = list(zip(source.outputs, self._outputs, strict=True))
        for value, output in results:
            # A module may return its input or a parameter as it is, or one value twice.
            if self._names.get(_name(value)) != output:
                self._nodes.append(Node("Identity", (self._use(value),), (output,)))
        # Rewriting in `_simplify` can leave constants without a reader.
        used = {name for node in self._nodes for name in node.inputs}
        return Graph(
            (Value(INPUT, (None, *_shape(image)[1:]), _dtype(image)),),
            tuple(Value(output, (*(None for _ in _shape(v)[:1]), *_shape(v)[1:]), _dtype(v)) for v, output in results),
            tuple(self._nodes),
            {name: array for name, array in self._constants.items() if name in used},
            tuple(self._parameters),
            int(self._model.opset_imports[""]),
        )

    def _read(self, node: onnx_ir.Node) -> None:
        if node.domain not in ("", "ai.onnx"):
            raise self._not_allowed(f"{node.domain}.{node.op_type}")
        if node.op_type == "Constant":
            self._arrays[_name(node.outputs[0])] = _constant_of(node)
            return
        if operator_of(node.op_type).identity:
            self._require_inference(node)
            source, name = _name(node.inputs[0]), _name(node.outputs[0])
            if source in self._arrays:
                self._arrays[name] = self._arrays[source]
            else:
                self._names[name] = self._use(node.inputs[0])
            return
        op, inputs, attributes = self._simplify(node, [self._use(value) for value in node.inputs])
        outputs = [self._define(op, value) for value in node.outputs]
        self._nodes.append(Node(op, _strip(inputs), _strip(outputs), attributes))

    def _require_inference(self, node: onnx_ir.Node) -> None:
        """Raises `UsageError` for a Dropout that drops entries in eval mode too."""
        training = self._arrays.get(_name(node.inputs[2])) if len(node.inputs) > 2 else None
        if training is not None and training.any():
            raise UsageError(
                f"{self._module} applies dropout in eval mode too, so its outputs are random; give the function "
                f"training=self.training, or use nn.Dropout."
            )

    def _simplify(self, node: onnx_ir.Node, inputs: list[str]) -> tuple[str, list[str], dict[str, Attribute]]:
        """Returns operator, inputs and attributes, in the simpler form if ONNX has two for the same computation."""
        op = node.op_type
        if op == "ConstantOfShape":
            # The attribute is an array, which attributes of a Graph cannot be; expanding a constant is equivalent.
            filler = _constant_of(node) if node.attributes else np.zeros(1, np.float32)
            return "Expand", [self._constant(filler), *inputs], {}
        if op == "Reshape" and _shape(node.inputs[0]) == () and self._constants.get(inputs[1], _ONE).tolist() == [-1]:
            # ONNX's shape inference follows a scalar through Unsqueeze, but not through Reshape.
            return "Unsqueeze", [inputs[0], self._constant(np.zeros(1, np.int64))], {}
        if op == "Conv" and inputs[2:] and not self._constants.get(inputs[2], _ONE).any():
            inputs = inputs[:2]  # torch writes zeros for an absent bias
        return op, inputs, {name: self._attribute(node, attr) for name, attr in node.attributes.items()}

    def _use(self, value: onnx_ir.Value | None) -> str:
        """Returns the name of a value that a node reads; empty for an absent one."""
        name = _name(value)
        if name in self._state:
            self._parameters[self._state[name]] = None
            return self._state[name]
        if name in self._arrays:
            return self._constant(self._arrays[name])
        return self._names[name] if name else ""

    def _define(self, op: str, value: onnx_ir.Value) -> str:
        """Returns the name of a node's output; empty if nothing reads it and the operator may leave it out."""
        if not value.name or not (value.uses() or value.name in self._results or operator_of(op).all_outputs):
            return ""
        self._names[value.name] = self._results.get(value.name) or self._fresh(op.lower())
        return self._names[value.name]

    def _constant(self, array: Array) -> str:
        # By content: exporters repeat small constants, such as axes, at every use.
        key = (array.dtype.name, array.shape, array.tobytes())
        if key not in self._by_content:
            self._by_content[key] = self._fresh("constant")
            self._constants[self._by_content[key]] = array
        return self._by_content[key]

    def _fresh(self, stem: str) -> str:
        counter = self._counters.setdefault(stem, itertools.count())
        return next(name for name in (f"{stem}_{i}" for i in counter) if name not in self._taken)

    def _attribute(self, node: onnx_ir.Node, attr: onnx_ir.Attr) -> Attribute:
        kind = _SCALARS.get(attr.type.name.removesuffix("S"))
        if kind is None:
            raise self._not_allowed(f"{node.op_type} with {attr.name} of type {attr.type.name}")
        # The list has one kind of entry, which a comprehension over `kind` cannot tell the type checker.
        value: Any = attr.value
        attribute: Attribute = tuple(map(kind, value)) if attr.type.name.endswith("S") else kind(value)  # type: ignore[assignment]
        return attribute

    def _not_allowed(self, operator: str) -> UsageError:
        return UsageError(
            f"{self._module} needs operator {operator}, which is not a standard ONNX operator; replace that layer by "
            f"one that torch exports with standard operators."
        )


def _constant_of(node: onnx_ir.Node) -> Array:
    """Returns the only attribute of a Constant node as an array."""
    (attr,) = node.attributes.values()
    if attr.name == "value":
        return np.asarray(attr.value.numpy())
    return np.asarray(attr.value, np.float32 if "float" in attr.name else np.int64)


def _name(value: onnx_ir.Value | None) -> str:
    """Returns the name of a value, empty for an absent input."""
    return (value.name or "") if value is not None else ""


def _dtype(value: onnx_ir.Value) -> str:
    """Returns the numpy name of the type of an input or output, which the exporter always states."""
    return value.dtype.numpy().name if value.dtype is not None else ""


def _shape(value: onnx_ir.Value | None) -> tuple[int | None, ...]:
    """Returns the dimensions of a value, None for free ones. A value of unknown rank has the batch dimension only."""
    dims = value.shape if value is not None and value.shape is not None else (None,)
    return tuple(n if isinstance(n, int) else None for n in dims)


def _strip(names: list[str]) -> tuple[str, ...]:
    """Removes absent names at the end."""
    while names and not names[-1]:
        names = names[:-1]
    return tuple(names)
