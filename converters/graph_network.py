"""A network that a graph describes: layers of torch for its weights, functions of torch for everything else.

Values that follow from sizes alone, such as the target of a Reshape, are computed beforehand for batches of two sizes.
What differs between both grows with the batch, so the network takes any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from converters.graph_functions import FUNCTIONS
from converters.graph_layers import Layer, layer_of
from dsr_tool.errors import DsrError, UsageError, first_line, join_words
from dsr_tool.graph.ir import Graph, Node
from dsr_tool.graph.limits import FREE_BYTES, memory_limit
from dsr_tool.graph.operators import operator_of
from dsr_tool.runtime.reference.call import FUNCTIONS as REFERENCE
from dsr_tool.runtime.reference.interpreter import live_nodes
from dsr_tool.sparsity.tensor import Array

__all__ = ["GraphNetwork", "Shapes", "takes_known"]

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of the parameters of a graph by name."""

_KNOWN_FROM = {
    "Clip": 1,
    "Dropout": 1,
    "Expand": 1,
    "Gather": 1,
    "Pad": 1,
    "Reshape": 1,
    "Resize": 1,
    "Slice": 1,
    "Split": 1,
    "Squeeze": 1,
    "Tile": 1,
    "Unsqueeze": 1,
    **{name: 1 for name in FUNCTIONS if name.startswith("Reduce")},
}
"""First of the inputs that a function of torch takes as known values; the ones before it are tensors."""
_BATCHES = (2, 3)
"""Sizes of the batches for which known values are computed: neither is 1, which broadcasts."""


@dataclass(frozen=True)
class _Growing:
    """A known value that may depend on the size of the batch: `start + step * batch`."""

    start: Array
    step: Array | None = None

    def at(self, batch: int | torch.SymInt) -> Array | list[int | torch.SymInt] | int | torch.SymInt:
        """Returns the value for a batch: an array, or a list if it depends on it."""
        if self.step is None:
            return self.start
        if self.start.ndim > 1:
            raise UsageError("a table that depends on the size of the batch is not supported in PyTorch.")
        pairs = zip(self.start.reshape(-1).tolist(), self.step.reshape(-1).tolist(), strict=True)
        entries = [start + step * batch if step else start for start, step in pairs]
        return entries if self.start.ndim else entries[0]


@dataclass
class _Recording:
    """Known values of one run, and which of them depend on sizes."""

    values: dict[str, Array]
    sized: set[str] = field(default_factory=set)


class GraphNetwork(nn.Module):
    """Computes a graph; `names` says under which name of the state_dict each of its parameters is."""

    def __init__(self, graph: Graph, shapes: Shapes, input_shape: tuple[int, ...]) -> None:
        """Builds the layers.

        Args:
            graph: one input; its parameters are weights, its constants are known values.
            shapes: shape of each parameter.
            input_shape: shape of one input, without the batch.

        Raises:
            UsageError: an operator or a form of one is not supported in PyTorch, or the graph takes no batch.
        """
        super().__init__()
        # The reference has operators that a network may need for sizes alone; a run tells whether it does.
        if unknown := {node.op for node in graph if node.op not in FUNCTIONS and node.op not in REFERENCE}:
            raise UsageError(
                f"a network with {join_words(sorted(unknown), 'and')} cannot be made in PyTorch from its graph; give "
                f"the network itself (module:callable), or export the ONNX file as it is (dsr-tool export)."
            )
        # Functions have the outputs that the reference has: readers of others, such as indices of MaxPool, are refused.
        live_nodes(tuple(graph), [value.name for value in graph.outputs])
        self.names: dict[str, tuple[str, bool]] = {}
        self._shapes = shapes
        self._graph, self._layers = graph, cast("dict[str, tuple[str, Layer]]", {})
        ranks = _ranks(graph, shapes, len(input_shape) + 1)
        forms: dict[object, tuple[str, Layer]] = {}
        for node in graph:
            layer = layer_of(node, shapes, ranks.get(node.inputs[0], 4) if node.inputs else 0)
            # A layer that is called several times is one module.
            form = (node.op, node.inputs[1:], tuple(sorted(node.attributes.items())))
            if layer is not None and form in forms:
                self._layers[node.outputs[0]] = forms[form]
            elif layer is not None and not any(name in self.names for name in layer.parameters):
                self._add_layer(node, layer)
                forms[form] = self._layers[node.outputs[0]]
        for name in graph.parameters:
            if name not in self.names:
                # One entry of a module, though nothing knows it as a weight.
                self.names[name] = self._place(name.split("."), nn.Parameter(torch.empty(shapes[name]))), False
        self._known: dict[str, _Growing] = {}
        self._known = self._record(input_shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        """Computes the outputs: one tensor, or tensors by name."""
        batch = x.shape[0]
        values: dict[str, torch.Tensor] = {self._graph.inputs[0].name: x}
        for node in self._graph:
            if node.outputs[0] not in self._known:
                self._compute(node, values, {n: one.at(batch) for n, one in self._inputs_known(node)})
        return self._results(values)

    def _inputs_known(self, node: Node) -> list[tuple[str, _Growing]]:
        return [(name, self._known[name]) for name in node.inputs if name in self._known]

    def _results(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor | dict[str, torch.Tensor]:
        found = {}
        for output in self._graph.outputs:
            if output.name not in values:
                raise UsageError(f"output {output.name[:80]!r} does not depend on the input; remove it.")
            found[output.name] = values[output.name]
        return next(iter(found.values())) if len(found) == 1 else found

    def _compute(self, node: Node, values: dict[str, torch.Tensor], known: Mapping[str, Any]) -> None:
        """Computes a node from tensors and known values, and adds its outputs."""
        x = values.get(node.inputs[0]) if node.inputs else None
        if node.outputs[0] in self._layers and x is not None:
            path, layer = self._layers[node.outputs[0]]
            values[node.outputs[0]] = layer.call(self.get_submodule(path), x)
            return
        first = _KNOWN_FROM.get(node.op, len(node.inputs))
        device = next(iter(values.values())).device
        arguments: list[Any] = []
        for i, name in enumerate(node.inputs):
            value: Any = None
            if name in values:
                value = values[name]
            elif name in self.names:
                path, _, local = self.names[name][0].rpartition(".")
                # Not get_parameter: where torch calls a module functionally, plain tensors stand for parameters.
                value = getattr(self.get_submodule(path), local)
            elif name:
                value = known[name]
                value = torch.tensor(np.array(value), device=device) if i < first else value
            arguments.append(value)
        if node.op not in FUNCTIONS:
            raise UsageError(
                "it has no counterpart in PyTorch here, or has weights that are computed, or that another node uses in "
                "another way."
            )
        inert = operator_of(node.op).inert
        results = FUNCTIONS[node.op]({k: v for k, v in node.attributes.items() if k not in inert}, *arguments)
        outputs = [results] if isinstance(results, torch.Tensor) else results
        values.update((name, tensor) for name, tensor in zip(node.outputs, outputs, strict=False) if name)

    # --- what is known beforehand ------------------------------------------------------------------------

    def _record(self, input_shape: tuple[int, ...]) -> dict[str, _Growing]:
        """Runs the network without values on batches of two sizes; returns what follows from the sizes alone."""
        training = self.training
        self.eval()
        try:
            with torch.no_grad(), torch.device("meta"), memory_limit(FREE_BYTES):
                first, second = (self._run(torch.empty(batch, *input_shape, device="meta")) for batch in _BATCHES)
        except DsrError:
            raise
        except Exception as error:  # torch and numpy raise anything for sizes that do not fit
            raise UsageError(
                f"the network cannot be run on inputs of {input_shape} in PyTorch ({first_line(error)}); give another "
                f"--input-shape."
            ) from error
        finally:
            self.train(training)
        return {name: _grown(name, array, second.values[name]) for name, array in first.values.items()}

    def _run(self, x: torch.Tensor) -> _Recording:
        record, values = _Recording(dict(self._graph.constants)), {self._graph.inputs[0].name: x}
        for node in self._graph:
            if node.op == "Shape" and node.inputs[0] in values:
                start, end = (cast("int | None", node.attributes.get(name)) for name in ("start", "end"))
                record.values[node.outputs[0]] = np.array(values[node.inputs[0]].shape[start:end], np.int64)
                record.sized.add(node.outputs[0])
                continue
            try:
                if self._is_known(node, record):
                    self._fold(node, record)
                else:
                    self._compute(node, values, record.values)
            except DsrError as error:
                raise UsageError(f"operator {node.op} (output {node.outputs[0][:80]!r}): {error}") from error
        results = self._results(values)
        for tensor in results.values() if isinstance(results, dict) else [results]:
            if tensor.ndim and tensor.shape[0] % len(x):
                raise UsageError(
                    f"the graph computes an output of {tuple(tensor.shape)} for a batch of {len(x)}; export it with a "
                    f"free batch."
                )
        return record

    def _is_known(self, node: Node, record: _Recording) -> bool:
        inputs = [name for name in node.inputs if name]
        # A value that is expanded to the size of the batch stays a tensor.
        grows = node.op == "Expand" or node.op == "Tile"  # noqa: PLR1714 - lists of operators are rows of one table
        large = grows and not record.sized.isdisjoint(inputs)
        return node.op in REFERENCE and all(name in record.values for name in inputs) and not large

    def _fold(self, node: Node, record: _Recording) -> None:
        inert = operator_of(node.op).inert
        attributes = {name: value for name, value in node.attributes.items() if name not in inert}
        arguments = [record.values[name] if name else None for name in node.inputs]
        results = REFERENCE[node.op](*arguments, **attributes)
        arrays = results if isinstance(results, tuple) else (results,)
        made = {name: np.asarray(one) for name, one in zip(node.outputs, arrays, strict=False) if name}
        record.values.update(made)
        if not record.sized.isdisjoint(node.inputs):
            record.sized.update(made)

    # --- names -------------------------------------------------------------------------------------------

    def _add_layer(self, node: Node, layer: Layer) -> None:
        own = layer.module.state_dict()
        for name, local in zip(layer.parameters, layer.locals, strict=True):
            shape = self._shapes[name][::-1] if layer.transposed and local == "weight" else self._shapes[name]
            if shape != tuple(own[local].shape):
                raise UsageError(
                    f"{node.op} (output {node.outputs[0][:80]!r}) cannot read {name[:80]!r} of shape "
                    f"{self._shapes[name]}; the graph does not fit its weights."
                )
        weight = layer.parameters[0]
        stem = weight.removesuffix(".weight") if weight.endswith(".weight") else weight.replace(".", "_")
        path = self._place(stem.split("."), layer.module)
        self._layers[node.outputs[0]] = path, layer
        for name, local in zip(layer.parameters, layer.locals, strict=True):
            self.names[name] = f"{path}.{local}", layer.transposed and local == "weight"

    def _place(self, parts: Sequence[str], item: nn.Module | nn.Parameter) -> str:
        """Puts a layer or a parameter where its name says, and returns the path: taken names get an underscore."""
        home: nn.Module = self
        path = []
        for part in parts[:-1]:
            name = part or "_"
            while hasattr(home, name) and type(home._modules.get(name)) is not nn.Module:
                name += "_"
            if name not in home._modules:
                home.add_module(name, nn.Module())
            home = cast("nn.Module", home._modules[name])
            path.append(name)
        last = parts[-1] or "_"
        while hasattr(home, last):
            last += "_"
        if isinstance(item, nn.Module):
            home.add_module(last, item)
        else:
            home.register_parameter(last, item)
        return ".".join([*path, last])


def takes_known(op: str, position: int) -> bool:
    """Returns whether an operator reads this input as a known value and not as a tensor."""
    return op in _KNOWN_FROM and position >= _KNOWN_FROM[op]


def _grown(name: str, one: Array, other: Array) -> _Growing:
    """Returns a known value as a function of the batch, from its values for both batches."""
    if one.shape == other.shape and np.array_equal(one, other):
        return _Growing(one)
    if one.shape != other.shape or one.dtype.kind != "i":
        raise UsageError(f"value {name[:80]!r} depends on the size of the batch in a way that is not supported.")
    step = (other - one) // (_BATCHES[1] - _BATCHES[0])
    return _Growing(one - step * _BATCHES[0], step)


def _ranks(graph: Graph, shapes: Shapes, rank: int) -> dict[str, int]:
    """Returns the number of dimensions of values, as far as batch normalisation needs it."""
    ranks = {graph.inputs[0].name: rank, **{name: len(shape) for name, shape in shapes.items()}}
    for node in graph:
        found = ranks.get(node.inputs[0], rank) if node.inputs else rank
        if node.op == "Flatten" or node.op == "Gemm":  # noqa: PLR1714 - lists of operators are rows of one table
            found = 2
        elif node.op == "Reshape" and len(node.inputs) > 1 and node.inputs[1] in graph.constants:
            found = graph.constants[node.inputs[1]].size
        ranks.update((name, found) for name in node.outputs)
    return ranks
