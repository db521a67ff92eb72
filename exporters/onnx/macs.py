"""Multiply-adds of each weight of an ONNX model, from the shapes that its operators imply.

ONNX's own shape inference does the work; most of this module keeps files that lie about sizes from hurting it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from dsr_tool.errors import FormatError, first_line
from dsr_tool.graph.operators import operator_of

__all__ = ["WeightUse", "static_shapes", "weight_uses"]

Shape = tuple[int, ...]

_REAL = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)
_SMALL = 1024
"""Largest number of entries of an initializer that inference gets to see: it may be a shape."""


@dataclass(frozen=True)
class WeightUse:
    """The use of a weight.

    Attributes:
        operator: `Conv`, `ConvTranspose`, `Gemm` or `MatMul`.
        macs_per_weight: multiply-adds that each entry takes part in for one input; 0 if shapes are unknown.
    """

    operator: str
    macs_per_weight: float


def weight_uses(
    model: ModelProto, weights: Mapping[str, ValueInfoProto], *, decode_steps: Set[str] = frozenset()
) -> dict[str, WeightUse]:
    """Finds the convolutions and matrix products that read weights.

    Args:
        model: the model.
        weights: type and static shape of each weight.
        decode_steps: names of values on the way from stored bytes to weights; the nodes that make them are skipped.

    Returns:
        The use of each weight that has one. If several operators read a weight, their multiply-adds are summed.

    Raises:
        FormatError: types or shapes of the model contradict each other.
    """
    light = _without_weights(model, weights, {*decode_steps, *weights})
    try:
        return _uses(light, {name: _static(value) or () for name, value in weights.items()})
    except (ArithmeticError, RuntimeError, ValueError, onnx.shape_inference.InferenceError) as error:
        raise FormatError(f"the shapes of the model are not understood ({first_line(error)}).") from error


def static_shapes(model: ModelProto, weights: Mapping[str, ValueInfoProto]) -> dict[str, Shape]:
    """Returns the shapes of all values that have one for a batch of 1, and of all weights.

    Args:
        model: the model, without nodes that decode weights.
        weights: type and static shape of each weight.

    Raises:
        FormatError: types or shapes of the model contradict each other.
    """
    try:
        shapes, _ = _shapes(_without_weights(model, weights, weights.keys()))
    except (ArithmeticError, RuntimeError, ValueError, onnx.shape_inference.InferenceError) as error:
        raise FormatError(f"the shapes of the model are not understood ({first_line(error)}).") from error
    return {**shapes, **{name: _static(value) or () for name, value in weights.items()}}


def _uses(model: ModelProto, weights: Mapping[str, Shape]) -> dict[str, WeightUse]:
    shapes, batch = _shapes(model)
    origin = {name: name for name in weights}
    uses: dict[str, WeightUse] = {}
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx"):
            continue
        operator = operator_of(node.op_type)
        # Behind a Transpose or Reshape, a weight is still the same weight under another name.
        if operator.keeps_entries and node.input[0] in origin:
            origin.setdefault(node.output[0], origin[node.input[0]])
        for slot in operator.weights:
            name = origin.get(node.input[slot])
            if name is not None:
                # For one input, whatever batch the file fixes; per entry, so that callers can count active ones alone.
                macs = _macs(node, shapes) / batch / max(math.prod(weights[name]), 1)
                before = uses[name].macs_per_weight if name in uses else 0.0
                uses[name] = WeightUse(node.op_type, before + macs)
    return uses


def _macs(node: NodeProto, shapes: Mapping[str, Shape]) -> int:
    """Counts the multiply-adds of one operator; without shapes, one row for Gemm and 0 for others."""
    first, second, out = (shapes.get(name) for name in (node.input[0], node.input[1], node.output[0]))
    if node.op_type == "Gemm" and second is not None and (first is None or out is None):
        return math.prod(second)
    if first is None or second is None or out is None:
        return 0
    # Each output entry of a convolution reads one filter; each input entry of a transposed one is spread by one.
    if node.op_type == "Conv":
        return math.prod(out) * math.prod(second[1:])
    if node.op_type == "ConvTranspose":
        return math.prod(first) * math.prod(second[1:])
    transposed = any(attr.name == "transA" and attr.i for attr in node.attribute)
    return math.prod(out) * (first[0] if transposed else first[-1])


def _shapes(model: ModelProto) -> tuple[dict[str, Shape], int]:
    """Returns the static shapes of all values, and the batch that they are for: 1 unless the model fixes another."""
    first = model.graph.input[0].type.tensor_type.shape.dim if model.graph.input else []
    if first and first[0].dim_value <= 0:
        first[0].dim_value = 1
    batch = first[0].dim_value if first else 1
    # Twice: the first inference, which follows no entries of vectors, finds the vectors that the second may follow.
    first_look = onnx.shape_inference.infer_shapes(model).graph
    nodes = list(_harmless(model.graph.node, first_look))
    body = helper.make_graph(nodes, "light", model.graph.input, model.graph.output)
    body.initializer.extend(model.graph.initializer)
    light = helper.make_model(body, opset_imports=model.opset_import, ir_version=model.ir_version)
    # data_prop follows the entries of shape vectors, without which the result of a Reshape stays unknown.
    try:
        graph = onnx.shape_inference.infer_shapes(light, data_prop=True).graph
    except MemoryError as error:
        raise FormatError("the graph claims sizes that no memory holds; the file is damaged.") from error
    return {**_known(graph), **{tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}}, batch


def _known(graph: GraphProto) -> dict[str, Shape]:
    shapes = {value.name: _static(value) for value in (*graph.input, *graph.value_info, *graph.output)}
    return {name: shape for name, shape in shapes.items() if shape is not None}


def _harmless(nodes: Iterable[NodeProto], seen: GraphProto) -> Iterator[NodeProto]:
    """Yields nodes for an inference that follows vectors entry by entry, without nodes that could make long ones.

    Shapes are short vectors of integers, but a vector in a file may claim any length: 2⁴⁰ entries would be followed.

    Args:
        nodes: all nodes of the graph.
        seen: the graph after an inference that follows no entries.
    """
    shapes = _known(seen)
    short = {name for name, shape in shapes.items() if len(shape) < 2 and math.prod(shape) <= _SMALL}
    real = {value.name for value in (*seen.value_info, *seen.output) if _element(value) in _REAL}
    for node in nodes:
        output = node.output[0] if node.output else ""
        if operator_of(node.op_type).arithmetic and output not in short:
            # Pow has the same output shape, and inference does not follow its entries.
            same_shape = NodeProto()
            same_shape.CopyFrom(node)
            same_shape.op_type = "Pow"
            yield same_shape
        elif node.op_type != "Concat" or output in short or output in real:
            yield node


def _static(value: ValueInfoProto) -> Shape | None:
    dims = value.type.tensor_type.shape.dim
    if not value.type.tensor_type.HasField("shape") or any(not dim.HasField("dim_value") for dim in dims):
        return None
    return tuple(dim.dim_value for dim in dims)


def _without_weights(model: ModelProto, weights: Mapping[str, ValueInfoProto], inner: Set[str]) -> ModelProto:
    """Copies a model for shape inference: weights become inputs, and claimed shapes of inner values are dropped."""
    graph, small = model.graph, []
    nodes = [node for node in graph.node if inner.isdisjoint(node.output)]
    declared = {value.name: value for value in graph.input}
    for tensor in graph.initializer:
        if tensor.name in weights or math.prod(tensor.dims) > _SMALL:
            declared.setdefault(tensor.name, _declare(tensor))
        else:
            small.append(tensor)
    # A weight's decoded type and shape win over whatever the file declares for it.
    inputs = list({**declared, **weights}.values())
    outputs = [ValueInfoProto(name=value.name, type=_unshaped(value)) for value in graph.output]
    body = helper.make_graph(nodes, "light", inputs, outputs, small)
    return helper.make_model(body, opset_imports=model.opset_import, ir_version=model.ir_version)


def _declare(tensor: TensorProto) -> ValueInfoProto:
    return helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))


def _unshaped(value: ValueInfoProto) -> onnx.TypeProto:
    return onnx.TypeProto(tensor_type=onnx.TypeProto.Tensor(elem_type=_element(value)))


def _element(value: ValueInfoProto) -> int:
    return int(value.type.tensor_type.elem_type)
