"""Source: an ONNX file of any tool, as a network of torch that can be pruned, trained and exported."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from converters.base import Source
from converters.graph_layers import LAYERS
from converters.graph_network import GraphNetwork, takes_known
from converters.state_dicts import fill, fill_from_file
from dsr_tool.errors import FormatError, UsageError
from dsr_tool.files import require_file
from dsr_tool.graph.ir import Graph
from dsr_tool.runtime.source import Model, open_model
from dsr_tool.sparse.macs import output_shape
from dsr_tool.sparsity.config import MOST_CLASSES, ModelConfig
from dsr_tool.sparsity.tensor import Array, SparseTensor

__all__ = ["SOURCE", "load"]

_GRAPH, _SHAPES = "onnx_graph", "onnx_shapes"
"""Entries of a model's `conversion` with the graph that describes the network, and the shapes of its parameters."""
_ENDING = ".onnx"
_VERIFIER = "exporters.onnx.verify_network"
"""Module that compares a network with its file, imported by name as the table of containers is: sources and containers
stand on one floor (`docs/decisions/0008-sessions-of-onnx-files.md`)."""


def load(
    name: str,
    weights: str | None = None,
    *,
    num_classes: int | None = None,  # noqa: ARG001 - the file decides
    input_size: int | None = None,  # noqa: ARG001
    input_shape: tuple[int, ...] = (),
    width: float = 1.0,  # noqa: ARG001
    seed: int = 0,  # noqa: ARG001
) -> tuple[nn.Module, ModelConfig]:
    """Builds the network of an ONNX file with its values, and compares it with ONNX Runtime on the file.

    Args:
        name: path of the file.
        weights: a state_dict file with other values; those of the ONNX file when absent.
        num_classes: not used.
        input_size: not used.
        input_shape: shape of one input, for a file that takes any.
        width: not used.
        seed: not used.

    Raises:
        FileError: there is no such file.
        FormatError: it is damaged.
        UsageError: the shape is missing or another one, or the network cannot be made in PyTorch.
        CheckFailed: the network does not compute what ONNX Runtime computes of the file.
    """
    require_file(Path(name), "ONNX file")
    model = open_model(Path(name))
    shape = _shape(name, model, input_shape)
    tensors = {parameter: _float32(model.tensor(parameter)) for parameter in model.graph.parameters}
    graph = _with_free_batch(_with_scalars(model.graph, tensors))
    shapes = {parameter: tensors[parameter].shape for parameter in graph.parameters}
    module = _build(graph, shapes, shape)
    state = {key: torch.empty_like(value, device="cpu") for key, value in module.state_dict().items()}
    for parameter, (key, transposed) in module.names.items():
        array = tensors[parameter]
        state[key] = torch.from_numpy(np.array(array.T if transposed else array, order="C"))
    for key, value in state.items():
        if key.endswith("num_batches_tracked"):
            value.zero_()
    fill(module, state)
    importlib.import_module(_VERIFIER).verify_network(Path(name), module, model.graph, shape)
    record = fill_from_file(module, name, weights)
    found = output_shape(module, shape)
    conversion = {
        **record,
        _GRAPH: json.loads(graph.to_json()),
        _SHAPES: {parameter: list(one) for parameter, one in shapes.items()},
    }
    classes = min(found[0], MOST_CLASSES) if found else 0
    config = ModelConfig("onnx", Path(name).stem, classes, shape, model.config.preprocessing, conversion=conversion)
    return module, config


def _structure(config: ModelConfig) -> nn.Module:
    """Builds the network of a description, on the meta device."""
    document, shapes = config.conversion.get(_GRAPH), config.conversion.get(_SHAPES)
    if document is None or not isinstance(shapes, Mapping):
        raise UsageError(
            f"{config.architecture!r} was exported from an ONNX file, and has no network in PyTorch; convert the ONNX "
            f"file (dsr-tool convert FILE.onnx --sparsity S -o MODEL_DIR), and export that."
        )
    graph = Graph.from_json(json.dumps(document))
    try:
        sizes = {str(name): tuple(int(n) for n in shape) for name, shape in shapes.items()}
        absent = [name for name in graph.parameters if name not in sizes]
        wrong = bool(absent) or any(n < 0 for shape in sizes.values() for n in shape) or len(graph.inputs) != 1
    except (TypeError, ValueError) as error:
        raise FormatError(
            f"the shapes of the model's parameters are invalid ({error}); the file is damaged."
        ) from error
    if wrong or not config.input_shape:
        raise FormatError("the graph of the model does not fit its description; the file is damaged.")
    return _build(graph, {name: sizes[name] for name in graph.parameters}, config.input_shape)


def _build(graph: Graph, shapes: Mapping[str, tuple[int, ...]], input_shape: tuple[int, ...]) -> GraphNetwork:
    try:
        with torch.device("meta"):
            return GraphNetwork(graph, shapes, input_shape)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, (UsageError, FormatError)):
            raise
        raise UsageError(f"the network cannot be made in PyTorch from its graph: {error}.") from error


def _shape(name: str, model: Model, given: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of one input."""
    own = model.graph.inputs[0].shape[1:]
    shape = given or tuple(n for n in own if n is not None)
    if not shape or len(shape) != len(own) or any(n not in (None, m) for n, m in zip(own, shape, strict=True)):
        expected = ",".join("any" if n is None else str(n) for n in own)
        raise UsageError(
            f"{name!r} takes inputs of the shape {expected}; give --input-shape with all sizes, such as 3,224,224."
        )
    if not np.issubdtype(np.dtype(model.graph.inputs[0].dtype), np.floating):
        raise UsageError(
            f"{name!r} takes inputs of type {model.graph.inputs[0].dtype}; networks of float32 inputs are converted."
        )
    return shape


def _float32(tensor: SparseTensor) -> Array:
    array = tensor.to_dense()
    return array.astype(np.float32, copy=False) if array.dtype.kind == "f" else array


def _with_scalars(graph: Graph, tensors: Mapping[str, Array]) -> Graph:
    """Returns the graph with single numbers and scales as constants: they are part of the computation."""
    uses = [(node.op, i, name) for node in graph for i, name in enumerate(node.inputs)]
    # Weights of layers are no such numbers, however small.
    weights = {name for op, _, name in uses if op in LAYERS}
    known = {name for op, i, name in uses if takes_known(op, i)}
    scalars = {n: tensors[n] for n in graph.parameters if (tensors[n].size == 1 and n not in weights) or n in known}
    input_ = replace(graph.inputs[0], dtype="float32")
    kept = tuple(name for name in graph.parameters if name not in scalars)
    constants: dict[str, Any] = {**graph.constants, **scalars}
    return replace(graph, inputs=(input_,), parameters=kept, constants=constants)


def _with_free_batch(graph: Graph) -> Graph:
    """Returns the graph for any batch: where a Reshape names the batch that the file fixes, it keeps the size."""
    fixed = graph.inputs[0].shape[0]
    if fixed is None:
        return graph
    constants, nodes = dict(graph.constants), []
    # Weights have no batch.
    held = {*graph.constants, *graph.parameters}
    for node in graph:
        target = graph.constants.get(node.inputs[1]) if node.op == "Reshape" and len(node.inputs) > 1 else None
        if node.inputs and node.inputs[0] in held:
            target = None
        if target is not None and target.ndim == 1 and target.size and target[0] == fixed:
            name = f"{node.inputs[1]}/any"
            constants[name] = np.array([0, *target[1:]], np.int64)
            node = replace(node, inputs=(node.inputs[0], name))  # noqa: PLW2901
        nodes.append(node)
    value = replace(graph.inputs[0], shape=(None, *graph.inputs[0].shape[1:]))
    return replace(graph, inputs=(value,), nodes=tuple(nodes), constants=constants)


SOURCE = Source(
    name="onnx",
    recognises=lambda name: name.lower().endswith(_ENDING),
    load=load,
    structure=_structure,
    has_options=False,
    may_be_trained=True,
)
"""The row of this source."""
