"""Sparse weights inside an ONNX file: bytes for positions, values, and standard operators that make the weight.

The operators read nothing but initializers and have static shapes, so a runtime that folds constants runs them once,
when it loads the file. NonZero is not among them: ONNX Runtime stopped folding it, and files that use it are decoded at
every inference. `docs/format.md` describes both forms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from onnx import SparseTensorProto, helper, numpy_helper

from dsr_tool.sparsity.grid import GridTensor
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import Array, SparseTensor
from exporters.onnx.nodes import Expression

__all__ = [
    "COMPACT_FORMS",
    "FLOATS",
    "LARGEST",
    "SHARED",
    "STEP_BITS",
    "Form",
    "Parts",
    "bitmask_form",
    "coo",
    "delta_form",
    "dense_form",
    "expression",
    "nonzero",
]

STEP_BITS = (8, 4)
"""Sizes of a step of the delta form, in bits. Steps of 4 bits are what most weights take at sparsity 0.9: without them,
ResNet-50 would be 3.5 % larger and, with float16 values, 6.1 %. Steps of 2 bits would save 0.4 and 0.6 % more."""

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
        codec: `delta` or `bitmask`; `dense`, for weights on a grid alone.
        bits: bits of one step; 1 for a bitmask.
        cut: True for a bitmask with bits beyond the last entry, which a Slice removes.
        scaled: True for a weight on a grid: values are codes, and each output channel has a scale.
    """

    codec: str
    bits: int
    cut: bool = False
    scaled: bool = False

    @property
    def tables(self) -> dict[str, Array]:
        """For each byte of the code, uint8 tables of shape (256, entries or steps in a byte).

        `flags` has 1 where an entry stands. `steps`, of the delta form alone, is the number of entries to move on.
        """
        if self.codec == "dense":
            return {}
        code = np.arange(256, dtype=np.uint8)[:, None]
        if self.codec == "bitmask":
            return {"flags": np.unpackbits(code, axis=1)}
        farthest = (1 << self.bits) - 1
        steps = (code >> np.arange(8 - self.bits, -1, -self.bits, dtype=np.uint8)) & np.uint8(farthest)
        # The largest step ends at no entry: it only crosses a gap.
        return {"flags": (steps < farthest).astype(np.uint8), "steps": np.minimum(steps, farthest - 1) + np.uint8(1)}


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
    weight: Expression
    if form.codec == "dense":
        weight = values
    elif form.codec == "delta":
        weight = ("Reshape", ("ScatterElements", ("Expand", "zero", "size"), _POSITIONS, entries), "shape")
    else:
        weight = ("Reshape", ("Slice", entries, "start", "size") if form.cut else entries, "shape")
    # Not DequantizeLinear: ONNX Runtime keeps that one in the graph, for kernels of integers that sparse weights lack.
    return ("Mul", weight, "scale") if form.scaled else weight


def nonzero(tensor: SparseTensor) -> SparseTensor:
    """Returns the tensor without active entries that are zero: they are of no use in a file for inference."""
    kept = _numbers(tensor) != 0
    if kept.all():
        return tensor
    mask = Mask(tensor.mask.shape, tensor.mask.positions[kept])
    if isinstance(tensor, GridTensor):
        return GridTensor(mask, tensor.codes[kept], tensor.scales)
    return SparseTensor(mask, tensor.values[kept])


def dense_form(tensor: GridTensor) -> Parts:
    """Encodes a weight on a grid as a code for every entry, inactive ones included."""
    codes = SparseTensor(tensor.mask, tensor.codes).to_dense()
    return Parts(Form("dense", 8, scaled=True), {"values": codes, **_scale(tensor)})


def bitmask_form(tensor: SparseTensor) -> Parts | None:
    """Encodes a weight as one bit an entry, and the values; None if positions do not fit int32."""
    if tensor.mask.size >= LARGEST:
        return None
    form = Form("bitmask", 1, cut=tensor.mask.size % 8 != 0, scaled=isinstance(tensor, GridTensor))
    own = {
        "code": tensor.mask.bits,
        "values": _zero_and(_numbers(tensor)),
        "shape": np.array(tensor.mask.shape, np.int64),
        **_scale(tensor),
    }
    if form.cut:
        own |= {"start": np.array([0], np.int64), "size": np.array([tensor.mask.size], np.int64)}
    return Parts(form, own)


def delta_form(tensor: SparseTensor, bits: int) -> Parts | None:
    """Encodes a weight as steps from entry to entry, several in a byte, and the values.

    A step s below the largest number of `bits` bits moves s + 1 entries on, and there an entry stands; the largest
    number moves that many entries on, and there is none. Steps fill whole bytes: if some are missing, a longer step is
    split in two, with an entry of value zero between.

    Returns:
        The parts, or None if positions do not fit int32 or no step can be split.
    """
    farthest, in_byte = (1 << bits) - 1, 8 // bits
    positions, values = tensor.mask.positions, _numbers(tensor)
    if tensor.mask.size >= LARGEST:
        return None
    # A weight without entries gets some that are zero, so that no runtime has to fold a sum of nothing.
    missing = -_step_count(positions, farthest) % in_byte if len(positions) else in_byte
    # Each filler adds exactly one step, so as many are taken as steps are missing in the last byte.
    fillers = _fillers(positions, tensor.mask.size, farthest)[:missing]
    if len(fillers) < missing:
        return None
    at = np.searchsorted(positions, fillers)
    positions, values = np.insert(positions, at, fillers), np.insert(values, at, 0)
    # A long gap is crossed by whole largest steps; what is left over is the step that ends at the entry.
    gaps, rest = np.divmod(np.diff(positions, prepend=-1) - 1, farthest)
    ends = np.cumsum(gaps + 1) - 1
    steps = np.full(ends[-1] + 1, farthest, np.uint8)
    steps[ends] = rest
    shifts = np.arange(8 - bits, -1, -bits, dtype=np.uint8)
    code = np.bitwise_or.reduce(steps.reshape(-1, in_byte) << shifts, axis=1)
    sizes = {"size": np.array([tensor.mask.size], np.int64), "shape": np.array(tensor.mask.shape, np.int64)}
    form = Form("delta", bits, scaled=isinstance(tensor, GridTensor))
    return Parts(form, {"code": code, "values": _zero_and(values), **sizes, **_scale(tensor)})


def coo(name: str, tensor: SparseTensor) -> SparseTensorProto:
    """Encodes a weight as ONNX's own sparse tensor: flat positions, int64 because the ONNX checker takes no other."""
    values = numpy_helper.from_array(tensor.values, name)
    indices = numpy_helper.from_array(tensor.mask.positions, "")
    return helper.make_sparse_tensor(values, indices, list(tensor.mask.shape))


COMPACT_FORMS: dict[str, Callable[[SparseTensor], Parts | None]] = {
    "bitmask": bitmask_form,
    **{f"delta {bits}": partial(delta_form, bits=bits) for bits in STEP_BITS},
}
"""Functions that encode a weight, by form; each returns None for a weight that it cannot hold."""


def _step_count(positions: Array, farthest: int) -> int:
    return len(positions) + int(((np.diff(positions, prepend=-1) - 1) // farthest).sum())


def _fillers(positions: Array, size: int, farthest: int) -> Array:
    """Returns inactive positions that cost exactly one step when they become entries."""
    rest = (np.diff(positions, prepend=-1) - 1) % farthest
    between = (positions - rest)[rest > 0]
    last = int(positions[-1]) if len(positions) else -1
    return np.concatenate((between, np.arange(last + 1, min(last + 1 + farthest, size))))


def _numbers(tensor: SparseTensor) -> Array:
    """Returns what is stored of the active entries: codes of a weight on a grid, else values."""
    return tensor.codes if isinstance(tensor, GridTensor) else tensor.values


def _scale(tensor: SparseTensor) -> dict[str, Array]:
    """Returns the leaf with the scales of a weight on a grid, which broadcasts over each output channel."""
    if not isinstance(tensor, GridTensor):
        return {}
    rank = len(tensor.mask.shape)
    return {"scale": tensor.scales.reshape(-1, *(1,) * (rank - 1)) if rank else tensor.scales.reshape(())}


def _zero_and(values: Array) -> Array:
    """Returns the values after a zero, which entries outside the mask read."""
    return np.concatenate((np.zeros(1, values.dtype), values))
