"""From a graph and its weights to an ONNX model, without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from dsr_tool.core.codecs import SparseTensor
from dsr_tool.core.folding import fold_norms
from dsr_tool.core.graph import Graph, Node, Value
from dsr_tool.errors import UsageError, unknown_name
from exporters.onnx_compact import compact_nodes, nonzero

__all__ = ["METADATA", "ONNX_ENCODINGS", "folded", "to_onnx"]

ONNX_ENCODINGS = ("auto", "dense", "delta")
METADATA = "dsr_tool"
"""Key of the model's metadata entry: a JSON object with the schema, the architecture and the sparse weights."""

_IR_VERSION = 10  # the newest that onnxruntime 1.20 reads
_MAX_BYTES = (1 << 31) - 1


def to_onnx(
    graph: Graph, tensors: Mapping[str, SparseTensor], *, encoding: str = "auto", architecture: str = ""
) -> ModelProto:
    """An ONNX model that computes what `graph` does with `tensors`, normalisations folded into convolutions.

    Args:
        graph: the computation; its values keep their names.
        tensors: every parameter of the graph, by name.
        encoding: `dense` for plain initializers, `delta` for byte distances wherever a weight is sparse, `auto`
            for the one of the two that takes fewer bytes, weight by weight.
        architecture: name for the record.

    Returns:
        A model with one dynamic dimension, the batch; the same bytes for the same arguments.

    Raises:
        UsageError: unknown encoding, or a model of more than 2 GB.
    """
    if encoding not in ONNX_ENCODINGS:
        raise unknown_name("ONNX encoding", encoding, ONNX_ENCODINGS)
    sparse = [name for name in graph.parameters if tensors[name].mask.active < tensors[name].mask.size]
    graph, tensors = folded(graph, tensors)
    nodes: list[NodeProto] = []
    initializers = [numpy_helper.from_array(graph.constants[name], name) for name in sorted(graph.constants)]
    for name in graph.parameters:
        made, stored = _weight(name, tensors[name], encoding)
        nodes += made
        initializers += stored
    _refuse_too_large(initializers)
    nodes += [_node(node) for node in graph]
    body = helper.make_graph(
        nodes, "model", [_value(v) for v in graph.inputs], [_value(v) for v in graph.outputs], initializers
    )
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
    }
    helper.set_model_props(model, {METADATA: json.dumps(record, separators=(",", ":"))})
    return model


def folded(graph: Graph, tensors: Mapping[str, SparseTensor]) -> tuple[Graph, dict[str, SparseTensor]]:
    """The graph without norms that a convolution can take over, and its weights in the type it computes in."""
    dtype = np.dtype(graph.inputs[0].dtype)
    typed = {name: tensors[name] for name in graph.parameters}
    for name, tensor in typed.items():
        if tensor.values.dtype.kind == "f":
            typed[name] = SparseTensor(tensor.mask, tensor.values.astype(dtype, copy=False))
    return fold_norms(graph, typed)


def _weight(name: str, tensor: SparseTensor, encoding: str) -> tuple[list[NodeProto], list[TensorProto]]:
    dense = numpy_helper.from_array(tensor.to_dense(), name)
    if encoding == "dense" or tensor.values.dtype.kind != "f" or tensor.mask.active == tensor.mask.size:
        return [], [dense]
    nodes, parts = compact_nodes(name, nonzero(tensor))
    nbytes = sum(node.ByteSize() for node in nodes) + sum(part.ByteSize() for part in parts)
    if encoding == "auto" and nbytes >= dense.ByteSize():
        return [], [dense]
    return nodes, parts


def _refuse_too_large(initializers: list[TensorProto]) -> None:
    nbytes = sum(tensor.ByteSize() for tensor in initializers)
    if nbytes > _MAX_BYTES:
        raise UsageError(
            f"the ONNX file would take {nbytes:,} bytes, more than the {_MAX_BYTES:,} that the format allows in one "
            f"file; export a smaller model, a sparser one with encoding 'auto', or an archive."
        )


def _node(node: Node) -> NodeProto:
    attributes: dict[str, Any] = {
        name: node.attributes[name] for name in sorted(node.attributes) if node.attributes[name] != ()
    }
    return helper.make_node(node.op, node.inputs, node.outputs, **attributes)


def _value(value: Value) -> ValueInfoProto:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(value.dtype))
    free = ["batch", *(f"{value.name}_{i}" for i in range(1, len(value.shape)))]
    shape = [name if n is None else n for name, n in zip(free, value.shape, strict=False)]
    return helper.make_tensor_value_info(value.name, kind, shape)
