"""A weight inside an ONNX file as byte distances and values, rebuilt by standard operators of static shape.

    distances -> Cast -> CumSum -> positions
    zeros -> Expand -> ScatterElements(positions, values) -> Reshape -> the weight

Everything comes from initializers, so a runtime that folds constants does this once, when it loads the file. There
is no NonZero in it: ONNX Runtime stopped folding that, and files that use it decode at every inference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from dsr_tool.core.codecs import SparseTensor
from dsr_tool.core.graph import Array
from dsr_tool.core.mask import Mask
from dsr_tool.errors import FormatError

__all__ = ["DECODE_OPERATORS", "compact_nodes", "compact_parts", "decode", "nonzero"]

DECODE_OPERATORS = ("Cast", "CumSum", "Expand", "ScatterElements", "Reshape")
_FARTHEST = 255
_MAX_ENTRIES = 1 << 31


def nonzero(tensor: SparseTensor) -> SparseTensor:
    """The tensor without active entries that are zero: a file for inference has no use for them."""
    kept = tensor.values != 0
    if kept.all():
        return tensor
    return SparseTensor(Mask(tensor.mask.shape, tensor.mask.positions[kept]), tensor.values[kept])


def compact_parts(tensor: SparseTensor) -> tuple[Array, Array]:
    """Distances (uint8) between consecutive entries, the first one from position 0, and the values (same length).

    Where a distance exceeds 255, fillers of value 0 come between. A tensor without entries becomes one filler.
    """
    positions = tensor.mask.positions
    if not len(positions):
        return np.zeros(1, np.uint8), np.zeros(1, tensor.values.dtype)
    gaps = np.diff(positions, prepend=0)
    fillers = np.maximum(gaps - 1, 0) // _FARTHEST
    entries = np.cumsum(fillers + 1) - 1
    distances = np.full(entries[-1] + 1, _FARTHEST, np.uint8)
    values = np.zeros(entries[-1] + 1, tensor.values.dtype)
    distances[entries] = gaps - _FARTHEST * fillers
    values[entries] = tensor.values
    return distances, values


def compact_nodes(name: str, tensor: SparseTensor) -> tuple[list[NodeProto], list[TensorProto]]:
    """The nodes that make the value `name` out of initializers, and those initializers."""
    distances, values = compact_parts(tensor)
    arrays = {
        f"{name}:distances": distances,
        f"{name}:values": values,
        f"{name}:axis": np.array(0, np.int64),
        f"{name}:zero": np.zeros(1, tensor.values.dtype),
        f"{name}:size": np.array([tensor.mask.size], np.int64),
        f"{name}:shape": np.array(tensor.mask.shape, np.int64),
    }
    wide, positions, zeros, flat = (f"{name}:{part}" for part in ("wide", "positions", "zeros", "flat"))
    nodes = [
        helper.make_node("Cast", [f"{name}:distances"], [wide], to=TensorProto.INT64),
        helper.make_node("CumSum", [wide, f"{name}:axis"], [positions]),
        helper.make_node("Expand", [f"{name}:zero", f"{name}:size"], [zeros]),
        helper.make_node("ScatterElements", [zeros, positions, f"{name}:values"], [flat], axis=0),
        helper.make_node("Reshape", [flat, f"{name}:shape"], [name]),
    ]
    return nodes, [numpy_helper.from_array(array, part) for part, array in arrays.items()]


def decode(
    nodes: Mapping[str, NodeProto], arrays: Mapping[str, TensorProto], name: str
) -> tuple[SparseTensor, list[str], list[str]] | None:
    """The weight that a value is, when the five nodes above make it from initializers alone.

    Args:
        nodes: every node of the graph by the first value that it makes.
        arrays: every initializer by name.
        name: the value asked about.

    Returns:
        The weight without its fillers, the names of the values on the way to it and of the initializers used;
        None when something else makes the value.

    Raises:
        FormatError: the pattern is there, but the numbers in it do not fit each other.
    """
    found: dict[str, NodeProto] = {}
    for operator, parent, slot in _PATTERN:
        value = found[parent].input[slot] if parent else name
        if value not in nodes or nodes[value].op_type != operator:
            return None
        if _ALTERING & {attribute.name for attribute in nodes[value].attribute}:
            return None
        found[operator] = nodes[value]
    sources = [found[operator].input[slot] for operator, slot in _SOURCES]
    if any(source not in arrays for source in sources):
        return None
    parts = [numpy_helper.to_array(arrays[source]) for source in sources]
    return _rebuild(name, parts), [node.output[0] for node in found.values()], sources


_PATTERN = (
    ("Reshape", "", 0),
    ("ScatterElements", "Reshape", 0),
    ("Expand", "ScatterElements", 0),
    ("CumSum", "ScatterElements", 1),
    ("Cast", "CumSum", 0),
)
_ALTERING = {"exclusive", "reverse", "reduction", "allowzero"}
_SOURCES = (
    ("Cast", 0),
    ("ScatterElements", 2),
    ("CumSum", 1),
    ("Expand", 0),
    ("Expand", 1),
    ("Reshape", 1),
)


def _rebuild(name: str, parts: list[Array]) -> SparseTensor:
    """The weight from the arrays of `_SOURCES`, in that order."""
    distances, values, axis, zero, size, shape = parts
    dimensions = tuple(int(n) for n in shape.reshape(-1))
    entries = math.prod(dimensions)
    positions = np.cumsum(distances.reshape(-1).astype(np.int64))
    consistent = (
        distances.dtype == np.uint8
        and distances.ndim == 1
        and distances.shape == values.shape
        and not axis.any()
        and not zero.any()
        and min(dimensions, default=1) >= 0
        and size.tolist() == [entries]
        and entries < _MAX_ENTRIES
        and not (distances[1:] == 0).any()
        and (not len(positions) or int(positions[-1]) < entries)
    )
    if not consistent:
        raise FormatError(f"weight {name!r} does not decode to {entries:,} entries of shape {dimensions}.")
    return nonzero(SparseTensor(Mask(dimensions, positions), values))
