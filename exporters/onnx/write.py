"""Building an ONNX model from a graph and its weights, without torch."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, SparseTensorProto, ValueInfoProto, helper

from dsr_tool.errors import UsageError, unknown_name
from dsr_tool.graph.fold import fold_norms
from dsr_tool.graph.ir import Graph, Node, Value
from dsr_tool.sparsity.grid import GridTensor
from dsr_tool.sparsity.layers import LayerSpec
from dsr_tool.sparsity.tensor import SparseTensor
from exporters.onnx import ONNX_ENCODINGS
from exporters.onnx.forms import FLOATS, coo, nonzero
from exporters.onnx.nodes import NodeWriter, field_bytes
from exporters.onnx.weights import add_weight, choose
from exporters.values import GRID_BITS, stored_as

__all__ = ["METADATA", "ONNX_ENCODINGS", "folded", "refuse_too_large", "to_onnx"]

METADATA = "dsr_tool"
"""Key of the model's metadata entry: a JSON object with the schema, the architecture and the sparse weights."""

_IR_VERSION = 10
"""Version of the file format; the newest that ONNX Runtime 1.20 reads."""
_MAX_BYTES = (1 << 31) - 1
"""Largest ONNX file, in bytes: protobuf refuses messages of 2 GiB."""


def to_onnx(
    graph: Graph,
    tensors: Mapping[str, SparseTensor],
    *,
    encoding: str = "auto",
    values: str = "fp32",
    specs: Mapping[str, LayerSpec] | None = None,
    architecture: str = "",
    notes: Mapping[str, object] | None = None,
) -> ModelProto:
    """Builds an ONNX model that computes the graph, with normalisation folded into convolutions.

    Args:
        graph: the computation; its values keep their names.
        tensors: every parameter of the graph, by name.
        encoding: `delta`, `bitmask` or `coo` stores every sparse weight in that form, `dense` writes plain
            initializers, `auto` takes the smallest of delta, bitmask and dense for each weight.
        values: `fp16` stores weights as float16, rounded once; the computation stays in its type. Grids (`int8` to
            `int4`) are made before norms are folded, which scales them and leaves their codes; weights that are on a
            grid already stay on it with any `values`.
        specs: description of the parameters; weights alone are rounded.
        architecture: name of the model, for the record.
        notes: more entries of the record, plain values for JSON.

    Returns:
        A model with one free dimension, the batch; the same arguments give the same bytes.

    Raises:
        UsageError: unknown encoding, a model of more than 2 GB, weights on a grid as `coo`, or a value that float16
            cannot hold.
    """
    if encoding not in ONNX_ENCODINGS:
        raise unknown_name("ONNX encoding", encoding, ONNX_ENCODINGS)
    # Before folding, which adds biases and drops norms.
    sparse = [name for name in graph.parameters if _is_sparse(tensors[name])]
    graph, tensors = folded(graph, tensors, values=values, specs=specs)
    writer = NodeWriter(_names(graph))
    # Sorted, so that equal models give equal bytes.
    for name in sorted(graph.constants):
        writer.initializer(graph.constants[name], name)
    sparse_initializers = _add_weights(writer, graph, tensors, encoding)
    # Before the parts are joined: protobuf would fail later, and with a message about messages.
    refuse_too_large(writer.nbytes + sum(map(field_bytes, sparse_initializers)))
    body = helper.make_graph(
        [*writer.nodes, *map(_node, graph, _node_names(graph, (node.name for node in writer.nodes)))],
        "model",
        [_value(v) for v in graph.inputs],
        [_value(v) for v in graph.outputs],
        writer.initializers,
        sparse_initializer=sparse_initializers,
    )
    # The versions are fixed by us: onnx's own defaults rise with its releases, and runtimes would refuse the file.
    model = helper.make_model(
        body,
        opset_imports=[helper.make_opsetid("", graph.opset)],
        ir_version=_IR_VERSION,
        producer_name="dsr-tool",
        producer_version=version("dsr-tool"),
    )
    record = {
        "schema": "dsr-tool/onnx/1",
        "architecture": architecture,
        "sparse_weights": [name for name in sparse if name in graph.parameters],
        **(notes or {}),
    }
    helper.set_model_props(model, {METADATA: json.dumps(record, separators=(",", ":"))})
    return model


def folded(
    graph: Graph,
    tensors: Mapping[str, SparseTensor],
    *,
    values: str = "fp32",
    specs: Mapping[str, LayerSpec] | None = None,
) -> tuple[Graph, dict[str, SparseTensor]]:
    """Folds norms into convolutions, and returns the graph with its parameters as they are stored.

    Args:
        graph: the computation.
        tensors: every parameter of the graph, by name.
        values: `fp16` rounds weights once, after folding.
        specs: description of the parameters.

    Raises:
        UsageError: an unknown name of values, or a weight that float16 cannot hold.
    """
    dtype = np.dtype(_computed(graph))
    # Archives may hold float16 weights; folding multiplies them, which must not round a second time.
    typed = {name: tensors[name] for name in graph.parameters}
    for name, tensor in typed.items():
        if tensor.values.dtype.kind == "f" and tensor.values.dtype != dtype:
            typed[name] = SparseTensor(tensor.mask, tensor.values.astype(dtype, copy=False))
    if values in GRID_BITS:
        typed |= stored_as(_unrounded(typed, specs), specs or {}, values)
    graph, typed = fold_norms(graph, typed)
    return graph, typed if values in GRID_BITS else typed | stored_as(_unrounded(typed, specs), specs or {}, values)


def _computed(graph: Graph) -> str:
    """Returns the type that weights are computed in: that of the input, or float32 if that is no float."""
    dtype = graph.inputs[0].dtype
    return dtype if np.dtype(dtype).kind == "f" else "float32"


def _unrounded(tensors: Mapping[str, SparseTensor], specs: Mapping[str, LayerSpec] | None) -> dict[str, SparseTensor]:
    """Returns the tensors that rounding may change: biases that folding made have no spec, and grids are rounded."""
    return {n: tensor for n, tensor in tensors.items() if n in (specs or {}) and not isinstance(tensor, GridTensor)}


def _add_weights(
    writer: NodeWriter, graph: Graph, tensors: Mapping[str, SparseTensor], encoding: str
) -> list[SparseTensorProto]:
    """Writes every parameter; returns those of `coo`, which are fields of the graph and not initializers."""
    dtype = _computed(graph)
    sparse = {name: nonzero(tensors[name]) for name in graph.parameters if _is_sparse(tensors[name])}
    forms = {} if encoding == "coo" else choose(sparse, encoding, dtype)
    sparse_initializers = []
    if encoding == "coo" and any(isinstance(tensors[name], GridTensor) for name in graph.parameters):
        raise UsageError(
            "--encoding 'coo' holds floats, not weights in few bits; use --encoding auto, delta, bitmask or dense."
        )
    for name in graph.parameters:
        if encoding == "coo" and name in sparse:
            stored = sparse[name].values.dtype.name
            alias = name if stored == dtype else writer.cast(FLOATS[dtype], name)
            sparse_initializers.append(coo(alias, sparse[name]))
        else:
            add_weight(writer, name, sparse.get(name, tensors[name]), forms.get(name, "dense"), dtype)
    return sparse_initializers


def _is_sparse(tensor: SparseTensor) -> bool:
    return tensor.mask.active < tensor.mask.size and tensor.values.dtype.kind == "f"


def _names(graph: Graph) -> set[str]:
    values = {value.name for value in (*graph.inputs, *graph.outputs)}
    return values | {name for node in graph for name in (*node.inputs, *node.outputs)}


def refuse_too_large(nbytes: int) -> None:
    """Raises `UsageError` for more bytes than one ONNX file can have."""
    if nbytes > _MAX_BYTES:
        raise UsageError(
            f"the ONNX file would take {nbytes:,} bytes, more than the {_MAX_BYTES:,} that the format allows in one "
            f"file; export a smaller model, a sparser one with encoding 'auto', or an archive."
        )


def _node_names(graph: Graph, taken: Iterable[str]) -> list[str]:
    """Returns a name for each node: that of the module whose weight it reads, with its operator, or of its output.

    Tools that insert nodes, such as converters to float16, name these after the nodes that they found.

    Args:
        graph: the computation.
        taken: names that other nodes have.
    """
    parameters, names = set(graph.parameters), set(taken)
    found = []
    for node in graph:
        module = next((name.rpartition(".")[0] for name in node.inputs if name in parameters), "")
        first = name = f"{module}/{node.op}" if module else node.outputs[0]
        for number in itertools.count(2):  # a module may be called several times
            if name not in names:
                break
            name = f"{first}_{number}"
        names.add(name)
        found.append(name)
    return found


def _node(node: Node, node_name: str) -> NodeProto:
    # An empty list has no type in ONNX; for every attribute that graphs have, it means the same as none.
    names = sorted(name for name, value in node.attributes.items() if value != ())
    attributes: dict[str, Any] = {name: node.attributes[name] for name in names}
    return helper.make_node(node.op, node.inputs, node.outputs, node_name, **attributes)


def _value(value: Value) -> ValueInfoProto:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(value.dtype))
    free = ["batch", *(f"{value.name}_{i}" for i in range(1, len(value.shape)))]
    shape = [name if n is None else n for name, n in zip(free, value.shape, strict=False)]
    return helper.make_tensor_value_info(value.name, kind, shape)
