"""Decoding the weights of an ONNX file to positions and values; no number in the file is trusted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from onnx import NodeProto, SparseTensorProto, TensorProto, helper, numpy_helper

from dsr_tool.errors import FormatError
from dsr_tool.sparsity.grid import GridTensor, grid_fault
from dsr_tool.sparsity.layers import matrix_shape
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import Array, SparseTensor
from exporters.onnx.forms import FLOATS, LARGEST, SHARED, STEP_BITS, Form, expression, nonzero
from exporters.onnx.nodes import match

__all__ = ["LAST_OPERATORS", "CompactWeight", "decode", "find", "from_coo", "from_dense", "shape_of", "to_array"]

_MOST_DIMENSIONS = 32
"""Largest number of dimensions of a weight: that of numpy before version 2."""
_CODECS = (Form("delta", STEP_BITS[0]), Form("bitmask", 1), Form("bitmask", 1, cut=True))
_FORMS = (*_CODECS, *(replace(form, scaled=True) for form in (Form("dense", 8), *_CODECS)))
"""One form for each computation; the size of delta's steps changes nothing but the tables."""
LAST_OPERATORS = frozenset(str(expression(form, "float32", "float16")[0]) for form in _FORMS)
"""Operators that make the weight of some form, so that nodes of others need no look."""
_SHARED_LEAVES = {*SHARED, "flags", "steps", "zero"}


@dataclass(frozen=True)
class CompactWeight:
    """A compact weight as it was found in a graph, not decoded yet.

    Attributes:
        name: name of the value that is the weight.
        form: the form in which it is stored, apart from the size of steps, which is in the tables.
        cast: numpy name of its type if its values are stored in another type, else empty.
        leaves: name of the initializer of each leaf of the form's expression.
        steps: names of all values that its nodes make.
    """

    name: str
    form: Form
    cast: str
    leaves: Mapping[str, str]
    steps: tuple[str, ...]

    def own(self) -> list[str]:
        """Returns the names of the initializers that no other weight reads."""
        return [source for leaf, source in self.leaves.items() if leaf not in _SHARED_LEAVES]


def find(name: str, nodes: Mapping[str, NodeProto], arrays: Mapping[str, TensorProto]) -> CompactWeight | None:
    """Finds the form in which a value is stored; None if the nodes that make it are those of no form.

    Args:
        name: name of the value.
        nodes: every node of the graph by the first value that it makes.
        arrays: every initializer by name.
    """
    # Some variants, each of which is dropped at its first operator that differs.
    for form in _FORMS:
        for cast in FLOATS if form.scaled else ("", *FLOATS):
            computation = expression(form, cast or "float16", "float16")
            found = match(computation, name, nodes, arrays)
            if found is not None and _has_types(form, cast, found.leaves, arrays):
                return CompactWeight(name, form, cast, found.leaves, tuple(found.steps))
    return None


def _has_types(form: Form, cast: str, leaves: Mapping[str, str], arrays: Mapping[str, TensorProto]) -> bool:
    """Tells a weight on a grid from one of floats, and from products of other tools that look like one."""
    values = arrays[leaves["values"]]
    if not form.scaled:
        return bool(values.data_type != TensorProto.INT8)
    # A scale for each first index; of compact forms, its length is checked where the weight is decoded.
    scale = arrays[leaves["scale"]]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(cast))
    fits = all(n == 1 for n in scale.dims[1:])
    if form.codec == "dense":
        fits = fits and len(scale.dims) == len(values.dims) and [*scale.dims[:1]] == [*_rows(values.dims)]
    return values.data_type == TensorProto.INT8 and scale.data_type == kind and fits


def _rows(dims: Sequence[int]) -> list[int]:
    """Returns the number of scales of a weight as the first size of their shape; nothing for a scalar."""
    return [matrix_shape(tuple(dims))[0]] if dims else []


def shape_of(found: CompactWeight, arrays: Mapping[str, TensorProto]) -> tuple[int, ...]:
    """Returns the shape of a compact weight.

    Raises:
        FormatError: the numbers are no shape, or one of 2³¹ entries or more.
    """
    if found.form.codec == "dense":
        return tuple(arrays[found.leaves["values"]].dims)
    shape = to_array(arrays[found.leaves["shape"]])
    if shape.dtype != np.int64 or shape.ndim != 1 or len(shape) > _MOST_DIMENSIONS or (shape < 0).any():
        raise _disagree(found.name)
    dimensions = tuple(int(n) for n in shape)
    if math.prod(dimensions) >= LARGEST:
        raise FormatError(f"weight {found.name!r} claims the shape {dimensions}, more than {LARGEST:,} entries.")
    return dimensions


def decode(found: CompactWeight, arrays: Mapping[str, TensorProto]) -> SparseTensor:
    """Decodes a compact weight, without entries that are zero; values keep the type that is stored.

    Raises:
        FormatError: the numbers do not fit each other, or steps have 2 bits.
    """
    # The order matters: sizes are bounded before constants are compared, and both before anything of that size is made.
    name, shape = found.name, shape_of(found, arrays)
    parts = {leaf: to_array(arrays[source]) for leaf, source in found.leaves.items()}
    _check_constants(name, found.form, parts, math.prod(shape))
    values, kind = parts["values"], "i" if found.form.scaled else "f"
    if found.form.codec == "dense":
        mask = Mask.from_bool(values != 0)
        return _on_grid(name, mask, values[values != 0], parts["scale"])
    code = parts["code"]
    if code.dtype != np.uint8 or code.ndim != 1 or values.ndim != 1 or values.dtype.kind != kind or values[:1].any():
        raise _disagree(name)
    mask = _bitmask(name, shape, code) if found.form.codec == "bitmask" else _delta_mask(name, shape, code, parts)
    if len(values) != mask.active + 1:
        raise _disagree(name)
    if found.form.scaled:
        return _on_grid(name, mask, values[1:], parts["scale"])
    return nonzero(SparseTensor(mask, values[1:]))


def _on_grid(name: str, mask: Mask, codes: Array, scale: Array) -> SparseTensor:
    """Returns a weight on a grid, without codes of zero."""
    expected = (matrix_shape(mask.shape)[0], *(1,) * (len(mask.shape) - 1)) if mask.shape else ()
    if scale.shape != expected:
        raise _disagree(name)
    tensor = GridTensor(mask, codes, scale.reshape(-1).astype(np.float32))
    if fault := grid_fault(tensor):
        raise FormatError(f"weight {name!r}: {fault}; such a weight is not read here.")
    return nonzero(tensor)


def from_dense(proto: TensorProto) -> SparseTensor:
    """Decodes a plain initializer; its mask is where it is not zero."""
    array = to_array(proto)
    return SparseTensor.from_dense(array, Mask.from_bool(array != 0))


def from_coo(sparse: SparseTensorProto) -> SparseTensor:
    """Decodes a sparse initializer, with flat positions or one index a dimension.

    Raises:
        FormatError: an index is outside the shape or not in increasing order.
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
    # Increasing positions: duplicates would make the result depend on the runtime.
    if flat.shape != (values.size,) or (np.diff(flat) <= 0).any():
        raise wrong
    if len(flat) and not 0 <= flat[0] <= flat[-1] < math.prod(shape):
        raise wrong
    return SparseTensor(Mask(shape, flat.astype(np.int64)), values.reshape(-1))


def to_array(proto: TensorProto) -> Array:
    """Returns the array of an initializer.

    Raises:
        FormatError: the bytes do not fit the shape.
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
    # int64, since the sum of the steps of a damaged file can exceed int32.
    stops = np.cumsum(parts["steps"][code].reshape(-1), dtype=np.int64) - 1
    if len(stops) and stops[-1] >= size:
        raise _disagree(name)
    return Mask(shape, stops[parts["flags"][code].reshape(-1) != 0])


def _check_constants(name: str, form: Form, parts: Mapping[str, Array], size: int) -> None:
    """Raises `FormatError` unless the constants and tables that all weights of a form share are those of the form."""
    if form.codec == "delta":
        form = Form("delta", _step_bits(name, parts["flags"]))
    expected: dict[str, Array] = {
        **SHARED,
        **form.tables,
        "start": np.zeros(1, np.int64),
        "size": np.array([size], np.int64),
    }
    for leaf, array in parts.items():
        other = expected.get(leaf, array)
        if array.dtype != other.dtype or not np.array_equal(array, other):
            raise _disagree(name)
    # Its type is that of the weight; only its value is fixed.
    zero = parts.get("zero", np.zeros(1, np.float32))
    if zero.shape != (1,) or zero.dtype.kind != "f" or zero.any():
        raise _disagree(name)


def _step_bits(name: str, flags: Array) -> int:
    """Returns the size of a step, which the width of its tables tells."""
    bits = 8 // flags.shape[1] if flags.shape in ((256, 1), (256, 2), (256, 4)) else 0
    if bits == 2:  # development versions before 0.1.0 wrote such files
        raise FormatError(
            f"weight {name!r} is stored in steps of 2 bits, which this dsr-tool does not read; export the model again."
        )
    if bits not in STEP_BITS:
        raise _disagree(name)
    return bits


def _disagree(name: str) -> FormatError:
    return FormatError(f"the parts of weight {name!r} do not fit each other; the file is damaged.")
