"""An op before buffers have addresses: what every kind has in common.

Ops are immutable. Their fields are symbolic: they refer to values, whose halos may still grow while later nodes are
lowered, so offsets and strides are asked for at the end alone (`parameters`). Fusing replaces an op by another one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from dsr_tool.runtime.compiler.layouts import Value
from dsr_tool.runtime.compiler.packing import Pack, Packer
from dsr_tool.runtime.kernels.cpu import CACHES, caches
from dsr_tool.runtime.kernels.ops import Activation, Kind
from dsr_tool.sparsity.tensor import Array

__all__ = ["IDENTITY", "L1_CLASSES", "Activate", "Op", "Parameters", "Target", "l1_class", "level_l1"]

L1_CLASSES = (32 << 10, 48 << 10, 64 << 10)
"""First-level caches in bytes that plans are made for. Few, so that most processors of a kind give the same bits."""


def l1_class(nbytes: int) -> int:
    """Returns the largest class of first-level caches that is not larger than one of `nbytes`, or the smallest."""
    return max((size for size in L1_CLASSES if size <= nbytes), default=L1_CLASSES[0])


def level_l1(level: str, *, runs: bool) -> int:
    """Returns the class of first-level caches that a plan for a level is made for.

    Args:
        level: name of the level.
        runs: whether this processor runs the level; a plan is then made for its own cache.
    """
    if runs:
        return l1_class(caches().l1)
    # Ice Lake, Zen 5 and later have 48 KiB; most of the others 32.
    return 48 << 10 if level == "avx512" else CACHES.l1


@dataclass(frozen=True)
class Target:
    """The properties of the kernels that the compiler asks for.

    Attributes:
        lanes: floats in a vector.
        threads: number of threads that share an op.
        widest_tile: most output vectors that sparse weights hold in registers.
        widest_dense_tile: the same of weights with their zeros, for each of four output channels.
        l1_bytes: first-level data cache of a core, one of `L1_CLASSES`. Blocks, and with them the order of sums, depend
            on it.
        l2_bytes: second-level cache of a core.
    """

    lanes: int
    threads: int
    widest_tile: int
    widest_dense_tile: int
    l1_bytes: int = CACHES.l1
    l2_bytes: int = CACHES.l2


@dataclass(frozen=True)
class Activate:
    """An activation with its parameters, as ops.def names them; those of other functions stay at their defaults."""

    function: Activation = Activation.CLIP
    low: float = -math.inf
    high: float = math.inf
    slope: float = 0.0
    shift: float = 0.0
    negative_scale: float = 0.0

    @property
    def nonnegative(self) -> bool:
        """True if no result is negative."""
        # Limits in the wrong order give `high`, which may be negative.
        clips_at_zero = self.function is Activation.CLIP and 0 <= self.low <= self.high
        return clips_at_zero or self.function is Activation.SIGMOID


IDENTITY = Activate()


class Parameters(NamedTuple):
    """The named parameters of an op.

    Attributes:
        fields: a number or an array for each field of the kind's struct in ops.def; arrays become addresses.
        pack: the packed weight that holds some of the arrays.
    """

    fields: Mapping[str, int | float | Array]
    pack: Pack | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Op:
    """One entry of a plan.

    Attributes:
        source: the value that it reads.
        out: the value that it makes.
        other: a second value that it reads, such as a residual.
        activate: the activation applied to its result.
        kind: the row of ops.def.
        fuses: an activation after it can become part of it.
        exact: it reads and writes the entries of flat values and no more, so they may be arrays of the caller; others
            use whole vectors.
        masks: it writes zeros at positions without a pixel, where its struct has a mask.
    """

    source: Value
    out: Value
    other: Value | None = None
    activate: Activate = IDENTITY

    kind: ClassVar[Kind]
    # Defaults are the safe choice, so that a new kind has to claim what its kernel can do.
    fuses: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    masks: ClassVar[bool] = True

    @property
    def work(self) -> float:
        """Its multiply-adds, as many as a dense kernel would do in the same time; 0 if it has no weights."""
        return 0.0

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of its active weights with pixels that exist, for one image; 0 if it has no weights."""
        return 0

    @property
    def density(self) -> float | None:
        """Density of its weight; None if it has none."""
        return None

    @property
    def dense_work(self) -> float:
        """Multiply-adds of a dense kernel for the same op; 0 if it has no weights."""
        return 0.0

    def parameters(self, packer: Packer) -> Parameters:
        """Returns its named parameters; all halos must be final.

        Args:
            packer: packs its weight, if it has one.
        """
        del packer
        return Parameters({})
