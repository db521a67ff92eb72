"""Weights of an ONNX file back to positions and values, whatever form they are in; no number in it is trusted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto, SparseTensorProto, TensorProto, numpy_helper

from dsr_tool.errors import FormatError
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import Array, SparseTensor
from exporters.onnx.forms import FLOATS, LARGEST, SHARED, STEP_BITS, Form, expression, nonzero, tables
from exporters.onnx.nodes import match

__all__ = ["Found", "decode", "find", "from_coo", "from_dense", "shape_of", "to_array"]

_MOST_DIMENSIONS = 32  # what the oldest numpy knows
_FORMS = (Form("delta", STEP_BITS[0]), Form("bitmask", 1), Form("bitmask", 1, cut=True))
_SHARED_LEAVES = {*SHARED, "flags", "steps", "zero"}


@dataclass(frozen=True)
class Found:
    """A compact weight in a graph.

    Attributes:
        name: of the value that is the weight.
        form: how it is stored; tables tell the size of steps.
        cast: numpy name of its type where its values are stored in another, else empty.
        leaves: name of the initializer of each leaf.
        steps: names of all values that its nodes make.
    """

    name: str
    form: Form
    cast: str
    leaves: Mapping[str, str]
    steps: tuple[str, ...]

    def own(self) -> list[str]:
        """Initializers that no other weight reads."""
        return [source for leaf, source in self.leaves.items() if leaf not in _SHARED_LEAVES]


def find(name: str, nodes: Mapping[str, NodeProto], arrays: Mapping[str, TensorProto]) -> Found | None:
    """The form in which a value is stored, where initializers and the nodes of one of our forms make it.

    Args:
        name: the value asked about.
        nodes: every node of the graph by the first value that it makes.
        arrays: every initializer by name.
    """
    for form in _FORMS:
        for cast in ("", *FLOATS):
            computation = expression(form, cast or "float16", "float16")
            if (found := match(computation, name, nodes, arrays)) is not None:
                return Found(name, form, cast, found.leaves, tuple(found.steps))
    return None


def shape_of(found: Found, arrays: Mapping[str, TensorProto]) -> tuple[int, ...]:
    """Shape of a compact weight.

    Raises:
        FormatError: it is no shape, or one of 2 billion entries.
    """
    shape = to_array(arrays[found.leaves["shape"]])
    if shape.dtype != np.int64 or shape.ndim != 1 or len(shape) > _MOST_DIMENSIONS or (shape < 0).any():
        raise _disagree(found.name)
    dimensions = tuple(int(n) for n in shape)
    if math.prod(dimensions) >= LARGEST:
        raise FormatError(f"weight {found.name!r} claims the shape {dimensions}, more than {LARGEST:,} entries.")
    return dimensions


def decode(found: Found, arrays: Mapping[str, TensorProto]) -> SparseTensor:
    """A compact weight without entries that are zero, its values in the type that is stored.

    Raises:
        FormatError: the numbers do not fit each other.
    """
    name, shape = found.name, shape_of(found, arrays)
    parts = {leaf: to_array(arrays[source]) for leaf, source in found.leaves.items()}
    _check_constants(name, found.form, parts, math.prod(shape))
    code, values = parts["code"], parts["values"]
    if code.dtype != np.uint8 or code.ndim != 1 or values.ndim != 1 or values.dtype.kind != "f" or values[:1].any():
        raise _disagree(name)
    mask = _bitmask(name, shape, code) if found.form.codec == "bitmask" else _delta_mask(name, shape, code, parts)
    if len(values) != mask.active + 1:
        raise _disagree(name)
    return nonzero(SparseTensor(mask, values[1:]))


def from_dense(proto: TensorProto) -> SparseTensor:
    """A plain initializer."""
    array = to_array(proto)
    return SparseTensor.from_dense(array, Mask.from_bool(array != 0))


def from_coo(sparse: SparseTensorProto) -> SparseTensor:
    """A sparse initializer, with flat positions or one index a dimension.

    Raises:
        FormatError: an index is outside the shape, or not in order.
    """
    shape = tuple(int(n) for n in sparse.dims)
    values, indices = to_array(sparse.values), to_array(sparse.indices)
    wrong = FormatError(f"sparse initializer {sparse.values.name!r} has indices out of order or outside {shape}.")
    if indices.dtype != np.int64 or min(shape, default=0) < 0 or len(shape) > _MOST_DIMENSIONS:
        raise wrong
    try:
        flat = np.ravel_multi_index(tuple(indices.T), shape) if indices.ndim == 2 else indices
    except ValueError as error:
        raise wrong from error
    if flat.shape != (values.size,) or (np.diff(flat) <= 0).any():
        raise wrong
    if len(flat) and not 0 <= flat[0] <= flat[-1] < math.prod(shape):
        raise wrong
    return SparseTensor(Mask(shape, flat.astype(np.int64)), values.reshape(-1))


def to_array(proto: TensorProto) -> Array:
    """The array of an initializer.

    Raises:
        FormatError: its bytes do not fit its shape.
    """
    try:
        array = numpy_helper.to_array(proto)
    except (ArithmeticError, MemoryError, TypeError, ValueError) as error:
        raise FormatError(
            f"initializer {proto.name!r} does not fit its shape ({error}); the file is damaged."
        ) from error
    return np.asarray(array)


def _bitmask(name: str, shape: tuple[int, ...], code: Array) -> Mask:
    try:
        return Mask.from_bits(code, shape)
    except FormatError as error:
        raise _disagree(name) from error


def _delta_mask(name: str, shape: tuple[int, ...], code: Array, parts: Mapping[str, Array]) -> Mask:
    size = math.prod(shape)
    # Every step moves on by one entry at least, so a sound weight never has more steps than entries.
    if code.size * parts["steps"].shape[1] > size:
        raise _disagree(name)
    stops = np.cumsum(parts["steps"][code].reshape(-1), dtype=np.int64) - 1
    if len(stops) and stops[-1] >= size:
        raise _disagree(name)
    return Mask(shape, stops[parts["flags"][code].reshape(-1) != 0])


def _check_constants(name: str, form: Form, parts: Mapping[str, Array], size: int) -> None:
    """Whether everything that is the same for each weight of a form is what it should be."""
    if form.codec == "delta":
        in_byte = parts["flags"].shape[-1] if parts["flags"].ndim else 0
        if in_byte not in (8 // bits for bits in STEP_BITS):
            raise _disagree(name)
        form = Form("delta", 8 // in_byte)
    expected: dict[str, Array] = {
        **SHARED,
        **tables(form),
        "start": np.zeros(1, np.int64),
        "size": np.array([size], np.int64),
    }
    for leaf, array in parts.items():
        other = expected.get(leaf, array)
        if array.dtype != other.dtype or not np.array_equal(array, other):
            raise _disagree(name)
    zero = parts.get("zero", np.zeros(1, np.float32))
    if zero.shape != (1,) or zero.dtype.kind != "f" or zero.any():
        raise _disagree(name)


def _disagree(name: str) -> FormatError:
    return FormatError(f"the parts of weight {name!r} do not fit each other; the file is damaged.")
