"""PICK and CONSTANT: picked and known entries become values that lie in memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from dsr_tool.errors import FormatError
from dsr_tool.runtime.compiler.layouts import Flat, Planes, Rows
from dsr_tool.runtime.compiler.op import Op, Parameters
from dsr_tool.runtime.compiler.packing import Packer
from dsr_tool.runtime.compiler.picked import Picked
from dsr_tool.runtime.kernels.ops import Kind
from dsr_tool.sparsity.tensor import Array

__all__ = ["Constant", "Pick", "can_be_planes", "constant_of", "pick_to_flat", "pick_to_planes", "split_of"]

_Int = npt.NDArray[np.int64]

_MAX_INNER = (1 << 31) - 1
"""Largest entry of the inner table of PICK, in floats: the kernel has it as int32, where a larger one would wrap."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Pick(Op):
    """Entries of a value, picked by tables, to another one.

    Attributes:
        picked: the entries.
        split: axes of `picked` before this one are the outer table, unless the result is planes.
        first: floats from the result to the first entry that it writes.
        step: floats of the result from one outer entry to the next; as many as the inner axes have if it is 0.
    """

    picked: Picked
    split: int = 0
    first: int = 0
    step: int = 0

    kind: ClassVar[Kind] = Kind.PICK
    exact: ClassVar[bool] = True
    masks: ClassVar[bool] = False  # positions without a pixel are filled with zeros as they are

    def parameters(self, packer: Packer) -> Parameters:
        """Returns both tables.

        Raises:
            FormatError: an entry lies too far away; the reference computes the model then.
        """
        del packer
        if isinstance(self.out, Planes):
            outer, inner = self._of_planes(self.out)
            step, phases = self.out.stride * self.out.grid.lanes, self.out.phases
        else:
            axes = range(len(self.picked.shape))
            outer = self.picked.floats(axes[: self.split], first=True).reshape(-1)
            inner = self.picked.floats(axes[self.split :], first=False).reshape(1, -1)
            step, phases = self.step or inner.size, 1
        if inner.max() > _MAX_INNER:
            raise FormatError(
                f"entries that lie {inner.max():,} floats apart are picked, and kernels reach {_MAX_INNER:,}; give "
                f"smaller inputs, or run the model on scipy."
            )
        run = _run(inner)
        return Parameters(
            {
                "outer": np.ascontiguousarray(outer, np.int64),
                "outer_count": outer.size,
                "inner": np.ascontiguousarray(inner[:, ::run], np.int32),
                "inner_count": inner.shape[1] // run,
                "phases": phases,
                "run": run,
                "out_first": self.first,
                "out_step": step,
                "factor": self.picked.factor,
                # The fill goes to positions without a pixel alone if every entry has a place, and these must be zero.
                "fill": self.picked.fill if self.picked.partial else 0.0,
            }
        )

    def _of_planes(self, out: Planes) -> tuple[_Int, _Int]:
        """Returns the distance to each channel, and to each position of a channel's planes."""
        picked, base = self.picked, self.picked.base
        channel, pixels = channel_axis(picked, out), pixel_axes(picked, out)
        outer = picked.floats((channel,), first=True).reshape(-1)
        same = isinstance(base, Planes) and (base.grid, base.factor) == (out.grid, out.factor)
        # They must be zero if some op relies on that, and are where one relies on it in the base.
        zeros = not _padded(out) or (isinstance(base, Planes) and _padded(base))
        if same and zeros and isinstance(base, Planes) and picked.has_pixels(pixels):
            # Whole planes, one after the other; positions without a pixel hold what they held.
            planes = np.arange(base.phases)[:, None] * (base.stride * base.grid.lanes)
            return outer, planes + np.arange(base.grid.length * base.grid.lanes)
        table, position = (
            picked.floats(pixels, first=False).reshape(-1),
            out.pixel_of_position().reshape(out.phases, -1),
        )
        return outer, np.where(position < 0, -1, table[np.maximum(position, 0)])


def _padded(planes: Planes) -> bool:
    """Returns whether positions without a pixel are zero."""
    return planes.zero_padded or planes.halo_before > 0 or planes.halo_after > 0


def channel_axis(picked: Picked, out: Planes) -> int:
    """Returns the axis that becomes the channels of planes."""
    return len(picked.shape) - 1 if isinstance(out, Rows) else 1


def pixel_axes(picked: Picked, out: Planes) -> list[int]:
    """Returns the axes that become the pixels of planes."""
    return [axis for axis in range(len(picked.shape)) if axis != channel_axis(picked, out)]


def _run(inner: _Int) -> int:
    """Returns the largest number of entries that always lie together, in each row of a table."""
    step = np.diff(inner, axis=1)
    together = (step == 1) & (inner[:, :-1] >= 0) | (inner[:, 1:] < 0) & (inner[:, :-1] < 0)
    return math.gcd(inner.shape[1], *(np.flatnonzero(~together.all(axis=0)) + 1).tolist())


def can_be_planes(picked: Picked, channel: int) -> bool:
    """Returns whether one op can write a value as planes with this axis as channels."""
    # Positions without a pixel are filled as well, and kernels rely on zeros there.
    return (picked.fill == 0 or not picked.partial) and picked.divides((channel,))


def split_of(picked: Picked, wanted: int | None = None) -> int | None:
    """Returns the axis at which places divide into an outer and an inner table of few entries; None if nowhere.

    Args:
        picked: the entries.
        wanted: the only axis that will do.
    """
    axes = range(len(picked.shape))
    able = [s for s in (*axes, len(axes)) if picked.divides(axes[s:]) and wanted in (None, s)]
    return min(able, key=lambda s: math.prod(picked.shape[:s]) + math.prod(picked.shape[s:]), default=None)


def pick_to_flat(picked: Picked, out: Flat) -> Op:
    """Returns the op that writes picked entries in order."""
    # One table for all entries is always possible.
    return Pick(source=picked.base, out=out, picked=picked, split=split_of(picked) or 0)


def pick_to_planes(picked: Picked, out: Planes) -> Op:
    """Returns the op that writes picked entries as planes, for which `can_be_planes` holds."""
    return Pick(source=picked.base, out=out, picked=picked)


@dataclass(frozen=True, eq=False, kw_only=True)
class Constant(Op):
    """Known entries in order.

    Attributes:
        values: the entries; the source is the result itself, since nothing is read.
    """

    out: Flat
    values: Array

    kind: ClassVar[Kind] = Kind.CONSTANT

    def parameters(self, packer: Packer) -> Parameters:
        """Returns the entries in whole vectors."""
        del packer
        values = np.zeros(self.out.size, np.float32)
        values[: self.values.size] = self.values.reshape(-1)
        return Parameters({"values": values})


def constant_of(values: Array, out: Flat) -> Constant:
    """Returns the op that makes a value of known entries."""
    return Constant(source=out, out=out, values=values)
