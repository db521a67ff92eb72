"""Old operator sets: a computation is converted by onnx's own version converter when a file is opened to be run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto, helper, version_converter

from dsr_tool.errors import FormatError, first_line

__all__ = ["OLDEST", "converted", "opset_of"]

OLDEST = 18
"""Oldest operator set that the runtimes compute; see `runtime/reference/interpreter.py`."""
_FIRST_WITH_MODES = 11
"""Operator set since which Resize says how it computes coordinates."""
_SMALL = 1024
"""Most entries of a weight that the converter gets to see: it may be an operand that becomes an attribute."""


def opset_of(model: ModelProto) -> int:
    """Returns the version of the standard's operator set that a model uses; 0 if it names none."""
    return next((int(item.version) for item in model.opset_import if item.domain in ("", "ai.onnx")), 0)


def converted(model: ModelProto, nodes: Sequence[NodeProto], weights: Mapping[str, ValueInfoProto]) -> ModelProto:
    """Returns a model of some nodes of another one, in operator set 18 or newer.

    Values keep their names. Large weights are inputs of the result, since the converter would copy their values several
    times; readers have them from the file.

    Args:
        model: a valid model.
        nodes: those of its nodes that are needed, in their order; they may read weights that none of them makes.
        weights: name, type and shape of its weights.

    Raises:
        FormatError: onnx cannot convert it.
    """
    light = ModelProto(ir_version=model.ir_version)
    light.opset_import.extend(model.opset_import)
    light.graph.CopyFrom(_light(model.graph, nodes, weights))
    version = opset_of(model)
    if version >= OLDEST or version < 1:
        return light
    try:
        result = version_converter.convert_version(light, OLDEST)
    except Exception as error:  # its errors have several classes, of C++ and of Python
        raise FormatError(
            f"its operator set {version} cannot be converted to {OLDEST} by onnx ({first_line(error)}); export the "
            f"model with operator set {OLDEST} or newer."
        ) from error
    if version < _FIRST_WITH_MODES:
        _set_modes(result.graph)
    return result


def _set_modes(graph: GraphProto) -> None:
    """Gives each Resize the coordinates of its old operator set, where the converter leaves today's defaults."""
    for node in graph.node:
        if node.op_type == "Resize":
            modes = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
            kept = [attribute for attribute in node.attribute if attribute.name not in modes]
            del node.attribute[:]
            node.attribute.extend([*kept, *(helper.make_attribute(name, mode) for name, mode in modes.items())])


def _light(graph: GraphProto, nodes: Sequence[NodeProto], weights: Mapping[str, ValueInfoProto]) -> GraphProto:
    """Returns a graph of these nodes, with large weights, and those that no node makes, as inputs."""
    small = {name for name, value in weights.items() if _entries(value) <= _SMALL}
    made = {name for node in nodes for name in node.output}
    arrays = [tensor for tensor in graph.initializer if tensor.name in small or tensor.name not in weights]
    held = made | {tensor.name for tensor in arrays}
    inputs = {value.name: value for value in graph.input}
    inputs |= {name: value for name, value in weights.items() if name not in held}
    return helper.make_graph(
        nodes, graph.name or "graph", list(inputs.values()), list(graph.output), arrays, value_info=graph.value_info
    )


def _entries(value: ValueInfoProto) -> int:
    return math.prod(dim.dim_value for dim in value.type.tensor_type.shape.dim)
