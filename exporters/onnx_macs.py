"""Multiply-adds of each weight of an ONNX model, from the shapes that its operators imply."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import onnx
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

__all__ = ["WeightUse", "weight_uses"]

Shape = tuple[int, ...]

# Inputs that are weights, by operator; a bias is none.
_WEIGHT_SLOTS = {"Conv": (1,), "ConvTranspose": (1,), "Gemm": (0, 1), "MatMul": (0, 1)}
_SAME_ENTRIES = {"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity", "Cast"}
_SMALL = 1024  # entries; initializers up to here may be shapes, which inference has to see


@dataclass(frozen=True)
class WeightUse:
    """How a weight is used.

    Attributes:
        operator: `Conv`, `ConvTranspose`, `Gemm` or `MatMul`.
        macs_per_weight: multiply-adds that each weight takes part in for one input; 0 where the shapes of the
            model do not say.
    """

    operator: str
    macs_per_weight: float


def weight_uses(model: ModelProto, weights: Mapping[str, Shape]) -> dict[str, WeightUse]:
    """For each of the `weights` (name -> shape) that a convolution or matrix product reads, that use.

    A weight that several of them read has the sum of their multiply-adds.
    """
    shapes, batch = _shapes(model)
    origin = {name: name for name in weights}
    uses: dict[str, WeightUse] = {}
    for node in model.graph.node:
        if node.op_type in _SAME_ENTRIES and node.input[0] in origin:
            origin[node.output[0]] = origin[node.input[0]]
        for slot in _WEIGHT_SLOTS.get(node.op_type, ()):
            name = origin.get(node.input[slot])
            if name is not None:
                macs = _macs(node, shapes) / batch / max(math.prod(weights[name]), 1)
                before = uses[name].macs_per_weight if name in uses else 0.0
                uses[name] = WeightUse(node.op_type, before + macs)
    return uses


def _macs(node: NodeProto, shapes: Mapping[str, Shape]) -> int:
    """Multiply-adds of one operator; where shapes are missing, one row for Gemm and 0 for others."""
    first, second, out = (shapes.get(name) for name in (node.input[0], node.input[1], node.output[0]))
    if node.op_type == "Gemm" and second is not None and (first is None or out is None):
        return math.prod(second)
    if first is None or second is None or out is None:
        return 0
    if node.op_type == "Conv":
        return math.prod(out) * math.prod(second[1:])
    if node.op_type == "ConvTranspose":
        return math.prod(first) * math.prod(second[1:])
    transposed = any(attr.name == "transA" and attr.i for attr in node.attribute)
    return math.prod(out) * (first[0] if transposed else first[-1])


def _shapes(model: ModelProto) -> tuple[dict[str, Shape], int]:
    """Static shapes of all values for a batch of one, and the batch where the model fixes another."""
    light = _without_weights(model)
    first = light.graph.input[0].type.tensor_type.shape.dim if light.graph.input else []
    if first and not first[0].dim_value:
        first[0].dim_value = 1
    batch = first[0].dim_value if first else 1
    graph = onnx.shape_inference.infer_shapes(light, data_prop=True).graph
    known = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        shape = _static(value)
        if shape is not None:
            known[value.name] = shape
    return known, batch


def _static(value: ValueInfoProto) -> Shape | None:
    dims = value.type.tensor_type.shape.dim
    if not value.type.tensor_type.HasField("shape") or any(not dim.HasField("dim_value") for dim in dims):
        return None
    return tuple(dim.dim_value for dim in dims)


def _without_weights(model: ModelProto) -> ModelProto:
    """A copy for shape inference in which large initializers are inputs; stated shapes of inner values are gone."""
    graph, small = model.graph, []
    inputs = list(graph.input)
    declared = {value.name for value in inputs}
    for tensor in graph.initializer:
        if math.prod(tensor.dims) <= _SMALL:
            small.append(tensor)
        elif tensor.name not in declared:
            inputs.append(_declare(tensor))
    outputs = [ValueInfoProto(name=value.name, type=_unshaped(value)) for value in graph.output]
    body = helper.make_graph(graph.node, "light", inputs, outputs, small)
    return helper.make_model(body, opset_imports=model.opset_import, ir_version=model.ir_version)


def _declare(tensor: TensorProto) -> ValueInfoProto:
    return helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))


def _unshaped(value: ValueInfoProto) -> onnx.TypeProto:
    return onnx.TypeProto(tensor_type=onnx.TypeProto.Tensor(elem_type=value.type.tensor_type.elem_type))
