"""Ops that move values between layouts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dsr_tool.runtime.compiler.layouts import Flat, Planes, Rows, Value
from dsr_tool.runtime.compiler.op import Op, Parameters
from dsr_tool.runtime.compiler.packing import Packer
from dsr_tool.runtime.kernels.ops import LIMITS, Kind

__all__ = ["Copy", "FromRows", "Gather", "Relayout", "ToRows", "to_flat", "to_planes"]

_MAX_POSITIONS = LIMITS["MAX_POSITIONS"]
"""Largest plane, in floats, that RELAYOUT moves by whole vectors."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Relayout(Op):
    """Rows of pixels, or planes of factor 1, to planes on another grid, by whole vectors."""

    out: Planes

    kind: ClassVar[Kind] = Kind.RELAYOUT
    exact: ClassVar[bool] = True
    masks: ClassVar[bool] = False  # rows are padded with zeros as they are moved

    def parameters(self, packer: Packer) -> Parameters:
        """Returns the sizes of both grids."""
        del packer
        # Entries in rows may have come to this shape by a Reshape, which the source does not know.
        _, _, height, width = self.out.shape
        length, pitch, step = 0, width, height * width
        if isinstance(self.source, Planes):
            length, pitch, step = self.source.grid.length, self.source.grid.pitch, self.source.channel_step
        return Parameters(
            {
                "source_length": length,
                "source_pitch": pitch,
                "source_step": step,
                "factor": self.out.factor,
                "height": height,
                "width": width,
                "out_pitch": self.out.grid.pitch,
            }
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class Gather(Op):
    """Pixels one at a time, by a table: to planes from anything, or from planes to entries in order.

    Attributes:
        step: every `step`-th row and column of the source is moved.
    """

    step: int = 1

    kind: ClassVar[Kind] = Kind.GATHER
    exact: ClassVar[bool] = True

    def parameters(self, packer: Packer) -> Parameters:
        """Returns the table and the distances between channels."""
        del packer
        source, out = self.source, self.out
        if isinstance(out, Planes):
            # By position of the result, so that it is written front to back while the source is read at random.
            pixel = out.pixel_of_position()
            index, entries = pixel, pixel[0].size
            source_step = out.shape[2] * out.shape[3]
            if isinstance(source, Planes):
                offset = source.offset_of_pixel()[:: self.step, :: self.step][: out.shape[2], : out.shape[3]]
                index, source_step = offset.reshape(-1)[np.maximum(pixel, 0)], source.channel_step
            channels, phases, out_step = out.channels, out.phases, out.stride * out.grid.lanes
        else:
            if not isinstance(source, Planes):
                raise TypeError(f"GATHER moves planes, not {type(source).__name__}, to entries in order")
            index, source_step = source.offset_of_pixel(), source.channel_step
            channels, phases, entries, out_step = source.channels, 1, index.size, index.size
        return Parameters(
            {
                # Positions without a pixel read the first one; the mask makes them zero.
                "index": np.ascontiguousarray(np.maximum(index, 0), np.int32),
                "channels": channels,
                "phases": phases,
                "entries": entries,
                "source_step": source_step,
                "out_step": out_step,
            }
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class Copy(Op):
    """Entries in order, unchanged."""

    out: Flat

    kind: ClassVar[Kind] = Kind.COPY
    exact: ClassVar[bool] = True

    def parameters(self, packer: Packer) -> Parameters:
        """Returns the number of entries."""
        del packer
        return Parameters({"entries": self.out.entries})


@dataclass(frozen=True, eq=False, kw_only=True)
class FromRows(Op):
    """Rows of features to planes."""

    out: Rows

    kind: ClassVar[Kind] = Kind.FROM_ROWS
    exact: ClassVar[bool] = True

    def parameters(self, packer: Packer) -> Parameters:
        """Returns the number of rows and features."""
        del packer
        return Parameters({"rows": self.out.shape[3], "features": self.out.channels})


@dataclass(frozen=True, eq=False, kw_only=True)
class ToRows(Op):
    """Planes to rows of features."""

    source: Rows

    kind: ClassVar[Kind] = Kind.TO_ROWS
    exact: ClassVar[bool] = True

    def parameters(self, packer: Packer) -> Parameters:
        """Returns the number of rows and features, and the vectors of a plane."""
        del packer
        rows, features = self.source.shape[3], self.source.channels
        return Parameters({"rows": rows, "features": features, "source_length": self.source.grid.length})


def to_planes(source: Value, out: Planes, step: int = 1) -> Op:
    """Returns the op that moves pixels, in rows or on planes, to planes.

    Args:
        source: the value to move.
        out: the planes to write.
        step: every `step`-th row and column of a source of planes is moved.
    """
    out.zero_padded = True
    lengths = [value.grid.length for value in (source, out) if isinstance(value, Planes)]
    lanes = out.grid.lanes
    whole_vectors = (
        step == 1
        and max(lengths) * lanes <= _MAX_POSITIONS
        # Squares of vectors would be more than half empty.
        and 2 * min(lengths) > lanes
        and out.factor in (1, 2, 4)
        and not (isinstance(source, Planes) and source.factor > 1)
    )
    return Relayout(source=source, out=out) if whole_vectors else Gather(source=source, out=out, step=step)


def to_flat(source: Value, out: Flat) -> Op:
    """Returns the op that writes any value as entries in order."""
    if isinstance(source, Rows):
        return ToRows(source=source, out=out)
    return Gather(source=source, out=out) if isinstance(source, Planes) else Copy(source=source, out=out)
