"""Sparse weights inside an ONNX file: the bytes that say where and what, and standard operators that make the weight.

Everything comes from initializers and has a static shape, so a runtime that folds constants does this once, when it
loads the file. There is no NonZero in it: ONNX Runtime stopped folding that, and files that use it decode at every
inference. `docs/format.md` describes both forms.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import SparseTensorProto, helper, numpy_helper

from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import Array, SparseTensor
from exporters.onnx.nodes import Expression

__all__ = [
    "FLOATS",
    "LARGEST",
    "SHARED",
    "STEP_BITS",
    "Form",
    "Parts",
    "bitmask_form",
    "coo",
    "delta_form",
    "expression",
    "nonzero",
    "tables",
]

STEP_BITS = (8, 4, 2)
"""Sizes of a step, in bits: the sparser a weight, the larger the size that takes the fewest bytes."""

FLOATS = {"float32": "ToFloat", "float64": "ToDouble"}
"""The cast to each type that weights are computed with."""

LARGEST = 1 << 31
"""No compact weight has that many entries: positions are int32."""

_FLAGS: Expression = ("Reshape", ("Gather", ("ToIndex", "flags"), ("ToIndex", "code")), "flat")
_STEPS: Expression = ("Reshape", ("Gather", ("ToIndex", "steps"), ("ToIndex", "code")), "flat")
# Number of the value that belongs to each flag; 0 where there is none, for the zero before all values.
_SLOTS: Expression = ("Mul", ("CumSum", _FLAGS, "axis"), _FLAGS)
_POSITIONS: Expression = ("Add", ("CumSum", _STEPS, "axis"), "before")

SHARED: dict[str, Array] = {
    "flat": np.array([-1], np.int64),
    "axis": np.array(0, np.int64),
    "before": np.array(-1, np.int32),
}
"""Constants of every form, apart from its tables and the `zero` that has the type of the weight."""


@dataclass(frozen=True)
class Form:
    """How a weight can be stored.

    Attributes:
        codec: `delta` or `bitmask`.
        bits: bits of one step, or 1 for a bitmask.
        cut: whether a bitmask has bits beyond the last entry.
    """

    codec: str
    bits: int
    cut: bool = False


@dataclass(frozen=True)
class Parts:
    """A weight in some form.

    Attributes:
        form: which one.
        own: the arrays that belong to this weight alone, by leaf.
    """

    form: Form
    own: dict[str, Array]


def expression(form: Form, dtype: str, stored: str) -> Expression:
    """What makes a weight of type `dtype` out of values of type `stored`."""
    values: Expression = "values" if stored == dtype else (FLOATS[dtype], "values")
    entries: Expression = ("Gather", values, _SLOTS)
    if form.codec == "delta":
        return ("Reshape", ("ScatterElements", ("Expand", "zero", "size"), _POSITIONS, entries), "shape")
    return ("Reshape", ("Slice", entries, "start", "size") if form.cut else entries, "shape")


def tables(form: Form) -> dict[str, Array]:
    """For each byte, what its steps are: `flags` (1 where an entry stands) and `steps` (entries to move on first).

    Returns:
        Arrays of shape (256, steps in a byte), uint8; a bitmask has `flags` alone.
    """
    code = np.arange(256, dtype=np.uint8)[:, None]
    if form.codec == "bitmask":
        return {"flags": np.unpackbits(code, axis=1)}
    farthest = (1 << form.bits) - 1
    steps = (code >> np.arange(8 - form.bits, -1, -form.bits, dtype=np.uint8)) & np.uint8(farthest)
    return {"flags": (steps < farthest).astype(np.uint8), "steps": np.minimum(steps, farthest - 1) + np.uint8(1)}


def nonzero(tensor: SparseTensor) -> SparseTensor:
    """The tensor without active entries that are zero: a file for inference has no use for them."""
    kept = tensor.values != 0
    if kept.all():
        return tensor
    return SparseTensor(Mask(tensor.mask.shape, tensor.mask.positions[kept]), tensor.values[kept])


def bitmask_form(tensor: SparseTensor) -> Parts | None:
    """One bit an entry, and the values; None where positions do not fit 32 bits."""
    if tensor.mask.size >= LARGEST:
        return None
    form = Form("bitmask", 1, cut=tensor.mask.size % 8 != 0)
    own = {"code": tensor.mask.bits, "values": _led(tensor.values), "shape": _sizes(*tensor.mask.shape)}
    if form.cut:
        own |= {"start": _sizes(0), "size": _sizes(tensor.mask.size)}
    return Parts(form, own)


def delta_form(tensor: SparseTensor, bits: int) -> Parts | None:
    """Steps from entry to entry, several in a byte, and the values.

    A step s below the largest number of `bits` bits moves s + 1 entries on, and there an entry stands; the largest
    number moves that many on, and there is none. Steps fill whole bytes: where some are missing, longer steps become
    two, with a zero at the stop.

    Returns:
        None where positions do not fit 32 bits, or no step can be broken in two.
    """
    farthest, in_byte = (1 << bits) - 1, 8 // bits
    positions, values = tensor.mask.positions, tensor.values
    if tensor.mask.size >= LARGEST:
        return None
    missing = -_steps(positions, farthest) % in_byte if len(positions) else in_byte
    stops = _stops(positions, tensor.mask.size, farthest)[:missing]
    if len(stops) < missing:
        return None
    at = np.searchsorted(positions, stops)
    positions, values = np.insert(positions, at, stops), np.insert(values, at, 0)
    skips, rest = np.divmod(np.diff(positions, prepend=-1) - 1, farthest)
    ends = np.cumsum(skips + 1) - 1
    steps = np.full(ends[-1] + 1, farthest, np.uint8)
    steps[ends] = rest
    shifts = np.arange(8 - bits, -1, -bits, dtype=np.uint8)
    code = np.bitwise_or.reduce(steps.reshape(-1, in_byte) << shifts, axis=1)
    sizes = {"size": _sizes(tensor.mask.size), "shape": _sizes(*tensor.mask.shape)}
    return Parts(Form("delta", bits), {"code": code, "values": _led(values), **sizes})


def coo(name: str, tensor: SparseTensor) -> SparseTensorProto:
    """The standard's own sparse tensor: flat positions, int64 because its checker takes nothing else."""
    values = numpy_helper.from_array(tensor.values, name)
    indices = numpy_helper.from_array(tensor.mask.positions, "")
    return helper.make_sparse_tensor(values, indices, list(tensor.mask.shape))


def _steps(positions: Array, farthest: int) -> int:
    return len(positions) + int(((np.diff(positions, prepend=-1) - 1) // farthest).sum())


def _stops(positions: Array, size: int, farthest: int) -> Array:
    """Inactive positions that cost exactly one step when they become entries."""
    rest = (np.diff(positions, prepend=-1) - 1) % farthest
    between = (positions - rest)[rest > 0]
    last = int(positions[-1]) if len(positions) else -1
    return np.concatenate((between, np.arange(last + 1, min(last + 1 + farthest, size))))


def _led(values: Array) -> Array:
    """The values behind a zero."""
    return np.concatenate((np.zeros(1, values.dtype), values))


def _sizes(*numbers: int) -> Array:
    return np.array(numbers, np.int64)
