"""Sparse weights inside an ONNX file: bytes for positions, values, and standard operators that make the weight.

The operators read nothing but initializers and have static shapes, so a runtime that folds constants runs them once,
when it loads the file. NonZero is not among them: ONNX Runtime stopped folding it, and files that use it are decoded at
every inference. `docs/format.md` describes both forms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from onnx import SparseTensorProto, helper, numpy_helper

from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import Array, SparseTensor
from exporters.onnx.nodes import Expression

__all__ = ["COMPACT_FORMS", "FARTHEST", "FLOATS", "LARGEST", "SHARED", "Form", "Parts", "coo", "expression", "nonzero"]

FARTHEST = 255
"""Largest step of the delta form, in entries: a step is one byte. Steps of 4 and 2 bits were tried and removed; for
ResNet-50 at sparsity 0.9 they saved 0.1 % of the file."""

FLOATS = {"float32": "ToFloat", "float64": "ToDouble"}
"""Cast to each type that weights are computed in, by numpy name."""

LARGEST = 1 << 31
"""Number of entries from which a weight cannot be compact: positions are int32."""

# Each expression stands in a file once, however many weights use it, if its leaves are shared.
_FLAGS: Expression = ("Reshape", ("Gather", ("ToIndex", "flags"), ("ToIndex", "code")), "flat")
_STEPS: Expression = ("Reshape", ("Gather", ("ToIndex", "steps"), ("ToIndex", "code")), "flat")
# Index into the values for each flag, 0 where there is no entry: a zero stands before all values.
_SLOTS: Expression = ("Mul", ("CumSum", _FLAGS, "axis"), _FLAGS)
_POSITIONS: Expression = ("Add", ("CumSum", _STEPS, "axis"), "before")

SHARED: dict[str, Array] = {
    "flat": np.array([-1], np.int64),
    "axis": np.array(0, np.int64),
    "before": np.array(-1, np.int32),
}
"""Constants that all forms share, by leaf; the tables and the `zero` of a weight's type come on top."""


@dataclass(frozen=True)
class Form:
    """A way to store a weight.

    Attributes:
        codec: `delta` or `bitmask`.
        cut: True for a bitmask with bits beyond the last entry, which a Slice removes.
    """

    codec: str
    cut: bool = False

    @property
    def tables(self) -> dict[str, Array]:
        """For each byte of the code, uint8 tables of shape (256, entries or steps in a byte).

        `flags` has 1 where an entry stands. `steps`, of the delta form alone, is the number of entries to move on.
        """
        code = np.arange(256, dtype=np.uint8)[:, None]
        if self.codec == "bitmask":
            return {"flags": np.unpackbits(code, axis=1)}
        # The largest step ends at no entry: it only crosses a gap.
        return {
            "flags": (code < FARTHEST).astype(np.uint8),
            "steps": np.minimum(code, FARTHEST - 1) + np.uint8(1),
        }


@dataclass(frozen=True)
class Parts:
    """A weight in some form.

    Attributes:
        form: the form.
        own: arrays that no other weight reads, by leaf of the expression.
    """

    form: Form
    own: dict[str, Array]


def expression(form: Form, dtype: str, stored: str) -> Expression:
    """Returns the computation that makes a weight of type `dtype` from values of type `stored`."""
    values: Expression = "values" if stored == dtype else (FLOATS[dtype], "values")
    entries: Expression = ("Gather", values, _SLOTS)
    if form.codec == "delta":
        return ("Reshape", ("ScatterElements", ("Expand", "zero", "size"), _POSITIONS, entries), "shape")
    return ("Reshape", ("Slice", entries, "start", "size") if form.cut else entries, "shape")


def nonzero(tensor: SparseTensor) -> SparseTensor:
    """Returns the tensor without active entries that are zero: they are of no use in a file for inference."""
    kept = tensor.values != 0
    if kept.all():
        return tensor
    return SparseTensor(Mask(tensor.mask.shape, tensor.mask.positions[kept]), tensor.values[kept])


def bitmask_form(tensor: SparseTensor) -> Parts | None:
    """Encodes a weight as one bit an entry, and the values; None if positions do not fit int32."""
    if tensor.mask.size >= LARGEST:
        return None
    form = Form("bitmask", cut=tensor.mask.size % 8 != 0)
    own = {
        "code": tensor.mask.bits,
        "values": _zero_and(tensor.values),
        "shape": np.array(tensor.mask.shape, np.int64),
    }
    if form.cut:
        own |= {"start": np.array([0], np.int64), "size": np.array([tensor.mask.size], np.int64)}
    return Parts(form, own)


def delta_form(tensor: SparseTensor) -> Parts | None:
    """Encodes a weight as one-byte steps from entry to entry, and the values.

    A step s below 255 moves s + 1 entries on, and there an entry stands; 255 moves 255 entries on, and there is none.

    Returns:
        The parts, or None if positions do not fit int32 or the weight is empty.
    """
    if not 0 < tensor.mask.size < LARGEST:
        return None
    positions, values = tensor.mask.positions, tensor.values
    if not len(positions):
        # ONNX Runtime's CumSum of nothing is untested ground, so a weight of zeros gets one entry that is zero.
        positions, values = np.zeros(1, np.int64), np.zeros(1, values.dtype)
    gaps, rest = np.divmod(np.diff(positions, prepend=-1) - 1, FARTHEST)
    ends = np.cumsum(gaps + 1) - 1
    code = np.full(ends[-1] + 1, FARTHEST, np.uint8)
    code[ends] = rest
    sizes = {"size": np.array([tensor.mask.size], np.int64), "shape": np.array(tensor.mask.shape, np.int64)}
    return Parts(Form("delta"), {"code": code, "values": _zero_and(values), **sizes})


def coo(name: str, tensor: SparseTensor) -> SparseTensorProto:
    """Encodes a weight as ONNX's own sparse tensor: flat positions, int64 because the ONNX checker takes no other."""
    values = numpy_helper.from_array(tensor.values, name)
    indices = numpy_helper.from_array(tensor.mask.positions, "")
    return helper.make_sparse_tensor(values, indices, list(tensor.mask.shape))


COMPACT_FORMS: dict[str, Callable[[SparseTensor], Parts | None]] = {"bitmask": bitmask_form, "delta": delta_form}
"""Functions that encode a weight, by encoding; each returns None for a weight that it cannot hold."""


def _zero_and(values: Array) -> Array:
    """Returns the values after a zero, which entries outside the mask read."""
    return np.concatenate((np.zeros(1, values.dtype), values))
