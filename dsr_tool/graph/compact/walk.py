"""The walk through a graph that finds the channels of each value, with one rule for each operator.

A rule returns True if it follows its node: the channels of its inputs may be removed, and the survey says which of
them the outputs are. Where there is no rule, or a rule returns False, all inputs keep their channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import cast

import numpy as np

from dsr_tool.graph.compact.channels import Channels, Floats, channel_axis
from dsr_tool.graph.compact.constants import BINARY, binary_constant, unary_constant
from dsr_tool.graph.compact.products import conv, gemm, matmul, may_see_padding
from dsr_tool.graph.compact.survey import Survey
from dsr_tool.graph.ir import Graph, Node
from dsr_tool.sparsity.tensor import Array, SparseTensor

__all__ = ["survey_graph"]


def survey_graph(graph: Graph, tensors: Mapping[str, SparseTensor]) -> Survey:
    """Walks through a graph and returns its channels.

    Args:
        graph: a computation whose norms are folded (`fold_norms`).
        tensors: a tensor for each of its parameters.
    """
    survey = Survey(graph, tensors)
    for node in graph:
        rule = _RULES.get(node.op, _elementwise)
        if rule(survey, node):
            survey.followed.add(node.outputs[0])
        else:
            survey.pin(*node.inputs)
    survey.pin(*(value.name for value in graph.outputs))
    return survey


# --- operators that treat every channel alike ----------------------------------------------------------


def _elementwise(survey: Survey, node: Node) -> bool:
    if node.op in BINARY and len(node.inputs) == 2:
        return _binary(survey, node)
    source = survey.values.get(node.inputs[0]) if node.inputs else None
    limits = [survey.array(name) if name else None for name in node.inputs[1:]]
    scalars = all(
        not name or (array is not None and array.size == 1) for name, array in zip(node.inputs[1:], limits, strict=True)
    )
    if source is None or not scalars or (limits and node.op != "Clip"):
        return False
    constant = unary_constant(node, source.constant, tuple(None if a is None else float(a.item()) for a in limits))
    return constant is not None and survey.add(node.outputs[0], replace(source, constant=constant))


def _binary(survey: Survey, node: Node) -> bool:
    one, other = (survey.values.get(name) for name in node.inputs)
    if one is not None and other is not None:
        if not one.aligned(other):
            return False
        # Channel i of the sum exists if either operand has it, so both must.
        survey.units.join(one.units, other.units)
        constant = binary_constant(node.op, one.constant, other.constant)
        rank = one.rank if one.rank == other.rank else None
        batch = rank is not None and (one.batch or other.batch)
        return survey.add(node.outputs[0], replace(one, constant=constant, rank=rank, batch=batch))
    value = one if one is not None else other
    operand = node.inputs[1 if one is not None else 0]
    if value is None or (channels := _operand_constant(survey, node, operand, value)) is None:
        return False
    pair = (value.constant, channels) if one is not None else (channels, value.constant)
    return survey.add(node.outputs[0], replace(value, constant=binary_constant(node.op, *pair)))


def _operand_constant(survey: Survey, node: Node, name: str, value: Channels) -> Floats | None:
    """Returns the value of a known operand for each channel of the value beside it; NaN where it varies.

    None if the operand is not known or cannot lose channels.
    """
    array = survey.array(name)
    if array is None:
        return None
    fits, axis = channel_axis(array, value)
    # An operand with a batch of its own would fix the size of the batch.
    if not fits or (array.ndim == value.rank and array.shape[0] != 1):
        return None
    if axis is not None:
        survey.sliced[node.outputs[0], name] = (axis, value)
    rows = np.moveaxis(array, axis, 0).reshape(value.count, -1) if axis is not None else array.reshape(1, -1)
    uniform = (rows == rows[:, :1]).all(axis=1)
    return np.broadcast_to(np.where(uniform, rows[:, 0].astype(np.float64), np.nan), value.count)


def _norm(survey: Survey, node: Node) -> bool:
    value = survey.values.get(node.inputs[0])
    arrays = [survey.array(name) for name in node.inputs[1:]]
    if value is None or value.position != 1 or node.attributes.get("training_mode", 0) or len(arrays) != 4:
        return False
    if any(array is None or array.shape != (value.count,) for array in arrays):
        return False
    for name in node.inputs[1:]:
        survey.sliced[node.outputs[0], name] = (0, value)
    scale, shift, mean, variance = (cast("Array", array).astype(np.float64) for array in arrays)
    factor = scale / np.sqrt(variance + cast("float", node.attributes.get("epsilon", 1e-5)))
    return survey.add(node.outputs[0], replace(value, constant=shift + (value.constant - mean) * factor))


def _pool(survey: Survey, node: Node) -> bool:
    value = survey.values.get(node.inputs[0])
    # A second output of MaxPool holds indices that count channels.
    if value is None or value.axis != 1 or len(node.outputs) > 1:
        return False
    constant = value.constant
    if node.op == "AveragePool" and node.attributes.get("count_include_pad", 0) and may_see_padding(node):
        # Zeros of the padding count, so at the border only a constant zero stays constant.
        constant = np.where(constant == 0, 0.0, np.nan)
    return survey.add(node.outputs[0], replace(value, constant=constant))


def _mean(survey: Survey, node: Node) -> bool:
    """Follows a ReduceMean over all axes of size: a global average pool."""
    value, axes = survey.values.get(node.inputs[0]), survey.array(node.inputs[1]) if node.inputs[1:] else None
    if value is None or value.axis != 1 or value.rank is None or axes is None:
        return False
    # A mean over channels would divide by the number of channels that are left.
    if {n + value.rank if n < 0 else n for n in axes.tolist()} != set(range(2, value.rank)):
        return False
    if not node.attributes.get("keepdims", 1):
        value = replace(value, axis=-1, rank=2)
    return survey.add(node.outputs[0], value)


# --- operators that move channels ----------------------------------------------------------------------


def _concat(survey: Survey, node: Node) -> bool:
    parts = [survey.values.get(name) for name in node.inputs]
    first = parts[0]
    if first is None or first.rank is None:
        return _flat_shape(survey, node)
    axis = cast("int", node.attributes["axis"])
    axis = axis + first.rank if axis < 0 else axis
    if any(p is None or (p.axis, p.rank) != (first.axis, first.rank) for p in parts) or axis != first.position:
        return False
    known = cast("list[Channels]", parts)
    units, constant = (np.concatenate([getattr(p, field) for p in known]) for field in ("units", "constant"))
    return survey.add(node.outputs[0], replace(first, units=units, constant=constant))


def _split(survey: Survey, node: Node) -> bool:
    value = survey.values.get(node.inputs[0])
    if value is None or value.rank is None or value.position != node.attributes.get("axis", 0):
        return False
    sizes = survey.array(node.inputs[1]) if node.inputs[1:] else None
    # Without sizes the pieces are equal, the last one smaller if the channels do not divide evenly.
    piece = -(-value.count // len(node.outputs))
    ends = np.cumsum(sizes if sizes is not None else [piece] * (len(node.outputs) - 1))
    pieces = [np.split(array, ends[: len(node.outputs) - 1].tolist()) for array in (value.units, value.constant)]
    if not all(node.outputs) or not all(len(part) for part in pieces[0]):
        return False
    for name, units, constant in zip(node.outputs, *pieces, strict=True):
        survey.add(name, replace(value, units=units, constant=constant))
    return True


def _reshape(survey: Survey, node: Node) -> bool:
    """Follows a flattening of (batch, channels, *size): each channel becomes as many features in a row."""
    value, (_, features) = survey.values.get(node.inputs[0]), survey.flat_shapes.get(node.inputs[1], ("", 0))
    if value is None or value.position != 1 or not value.batch or not features or features % value.count:
        return False
    # Channels come before positions, so the features of one channel are neighbours.
    times = features // value.count
    units, constant = np.repeat(value.units, times), np.repeat(value.constant, times)
    return survey.add(node.outputs[0], Channels(units, constant, -1, 2, batch=True))


# --- shapes and transposed weights: noted for the rules above ------------------------------------------


def _shape(survey: Survey, node: Node) -> bool:
    """Follows the size of the batch, which does not change with the channels."""
    value, name = survey.values.get(node.inputs[0]), node.outputs[0]
    part = (node.attributes.get("start", 0), node.attributes.get("end"))
    survey.batch_sizes |= {name} if value is not None and value.batch and part == (0, 1) else set()
    return name in survey.batch_sizes


def _same_number(survey: Survey, node: Node) -> bool:
    survey.batch_sizes |= {node.outputs[0]} if node.inputs[0] in survey.batch_sizes else set()
    return node.outputs[0] in survey.batch_sizes


def _flat_shape(survey: Survey, node: Node) -> bool:
    """Notes the shape (batch, features), which a Reshape reads; the node itself stays."""
    last = survey.graph.constants.get(node.inputs[-1])
    if len(node.inputs) == 2 and node.inputs[0] in survey.batch_sizes and last is not None and last.size == 1:
        survey.flat_shapes[node.outputs[0]] = (node.inputs[0], int(last.item()))
    return False


def _transpose(survey: Survey, node: Node) -> bool:
    if survey.owns(node.inputs[0]) and node.attributes.get("perm") == (1, 0):
        survey.transposed[node.outputs[0]] = node.inputs[0]
    return False


_RULES: dict[str, Callable[[Survey, Node], bool]] = {
    "AveragePool": _pool,
    "BatchNormalization": _norm,
    "Concat": _concat,
    "Conv": conv,
    "Gemm": gemm,
    "GlobalAveragePool": _pool,
    "GlobalMaxPool": _pool,
    "MatMul": matmul,
    "MaxPool": _pool,
    "ReduceMean": _mean,
    "Reshape": _reshape,
    "Shape": _shape,
    "Split": _split,
    "Squeeze": _same_number,
    "Transpose": _transpose,
    "Unsqueeze": _same_number,
}
"""The rule of an operator by its name; all others have the rule of elementwise operators."""
