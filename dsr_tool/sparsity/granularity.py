"""Granularity: which weights are active or inactive together, and which positions share a number of active ones."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy.typing as npt

from dsr_tool.errors import UsageError, unknown_name
from dsr_tool.sparsity.apportion import apportion

__all__ = ["GRANULARITIES", "MOST_GROUP", "SINGLE", "UNSTRUCTURED", "Blocks", "Granularity", "groups", "whole_units"]

GRANULARITIES = ("weight", "kernel", "fan-in", "N:M")
"""Values of `--granularity`; N and M stand for numbers, as in 2:4."""
UNSTRUCTURED = ("weight", "kernel")
"""Granularities that leave open where in a layer its active weights or kernels are."""
MOST_GROUP = 64
"""Largest M of N:M: the ways to choose N of 64 are fewer than 2^63."""

_PATTERN = re.compile(r"([0-9]{1,9}):([0-9]{1,9})")

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Blocks:
    """Blocks divide the positions of a layer; all have one size, and each has as many active weights.

    A weight has the shape (outputs, inputs, kernel dimensions). Blocks are consecutive positions once input channels
    are its last dimension: (outputs, taps, inputs), where taps are the positions of a kernel.

    Attributes:
        outputs: first size of the weight.
        inputs: its second size: the input channels that an output reads.
        taps: product of its other sizes; 1 for a linear layer.
        size: number of positions of a block; divides `inputs * taps`.
    """

    outputs: int
    inputs: int
    taps: int
    size: int

    @classmethod
    def of(cls, shape: Sequence[int], size: int) -> Blocks:
        """Returns the blocks of `size` positions of a weight with this shape."""
        return cls(shape[0], shape[1], math.prod(shape[2:]), size)

    @property
    def count(self) -> int:
        """Number of blocks."""
        return self.outputs * self.inputs * self.taps // self.size

    def split(self, array: Array) -> Array:
        """Returns an array of the weight's size as one row per block, shape (count, size)."""
        by_output = array.reshape(self.outputs, self.inputs, self.taps)
        rows: Array = by_output.swapaxes(1, 2).reshape(self.count, self.size)
        return rows

    def join(self, rows: Array) -> Array:
        """Returns the flat array, in row-major order of the weight, that `split` took apart."""
        by_output = rows.reshape(self.outputs, self.taps, self.inputs)
        flat: Array = by_output.swapaxes(1, 2).reshape(-1)
        return flat


@dataclass(frozen=True)
class Granularity:
    """A value of `--granularity`.

    - `weight`: every weight by itself.
    - `kernel`: the weights between an input and an output channel of a convolution are active or inactive together.
    - `fan-in`: every output of a layer has the same number of active weights (Lasby et al., ICLR 2024).
    - `N:M`: of every M consecutive input channels, N are active, for each output and each position of a kernel.

    Attributes:
        kind: one of `GRANULARITIES`.
        kept: N of N:M, else 0.
        group: M of N:M, else 0.
    """

    kind: str
    kept: int = 0
    group: int = 0

    @classmethod
    def parse(cls, text: str) -> Granularity:
        """Returns the granularity of a text such as `kernel` or `2:4`.

        Raises:
            UsageError: there is no such granularity.
        """
        if ":" in text:
            match = _PATTERN.fullmatch(text)
            kept, group = (int(match[1]), int(match[2])) if match else (0, 0)
            if not 0 < kept < group <= MOST_GROUP:
                raise UsageError(
                    f"granularity {text!r} is not allowed; in N:M, N is at least 1 and below M, and M at most "
                    f"{MOST_GROUP}, such as 2:4."
                )
            return cls("N:M", kept, group)
        if text not in GRANULARITIES:
            raise unknown_name("granularity", text, GRANULARITIES)
        return cls(text)

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}" if self.group else self.kind

    @property
    def density(self) -> Fraction | None:
        """Density of every sparse layer of N:M; None where a budget decides."""
        return Fraction(self.kept, self.group) if self.group else None

    def unit(self, shape: Sequence[int]) -> int:
        """Returns the number of weights that are active or inactive together: 1, or kh * kw for a kernel.

        Weights with two dimensions (linear layers, embeddings, attention) are single at every granularity, as in the
        code of Mostafa & Wang 2019.
        """
        return math.prod(shape[2:]) if self.kind == "kernel" else 1

    def blocks(self, shape: Sequence[int]) -> Blocks | None:
        """Returns the blocks of a layer that all have as many active weights; None if the layer has no such pattern."""
        if self.kind in UNSTRUCTURED:
            return None
        return Blocks.of(shape, self.group or math.prod(shape[1:]))

    def step(self, shape: Sequence[int]) -> int:
        """Returns the number of weights of which a layer's number of active weights is a multiple.

        That is a unit, or one weight in every output; with N:M it is all that the layer has.
        """
        blocks = self.blocks(shape)
        return blocks.count * max(self.kept, 1) if blocks else self.unit(shape)

    def misfit(self, shape: Sequence[int]) -> str | None:
        """Returns why a convolution or linear layer cannot have the pattern; None if it can."""
        if self.group and shape[1] % self.group:
            channels = "1 input channel is" if shape[1] == 1 else f"{shape[1]} input channels are"
            return f"{channels} no multiple of {self.group} ({self})"
        return None

    def refuse(self, option: str) -> UsageError:
        """Returns the error for an option that contradicts the density of N:M."""
        return UsageError(
            f"{option} contradicts --granularity {self}, with which every sparse layer has sparsity "
            f"{float(1 - (self.density or 0)):.6g}; leave it out."
        )


SINGLE = Granularity("weight")
"""The usual granularity: every weight by itself."""


def groups(units: Sequence[int]) -> list[list[int]]:
    """Groups the indices of layers by the size of their units, largest units first.

    Within a group, a unit of one layer can be exchanged for a unit of another without changing the number of weights.
    """
    return [[i for i, unit in enumerate(units) if unit == size] for size in sorted(set(units), reverse=True)]


def whole_units(counts: Sequence[int], sizes: Sequence[int], units: Sequence[int]) -> list[int]:
    """Converts numbers of active weights per layer to numbers of whole units.

    Each group of layers with units of one size gets as many units as its weights make. The rest goes to the group with
    the next smaller units. The total is therefore exact if single weights have room, and otherwise less by as little as
    possible.

    Args:
        counts: number of active weights per layer; their sum is at least that of `units`.
        sizes: number of weights per layer.
        units: number of weights per unit, by layer.

    Returns:
        Number of units per layer, at least one each, in the proportions of `counts`.
    """
    # At least one unit for each layer, within its size.
    counts = apportion(sum(counts), counts, sizes, units)
    result, rest = [0] * len(counts), 0
    for layers in groups(units):
        unit = units[layers[0]]
        rooms = [sizes[i] // unit for i in layers]
        wanted = sum(counts[i] for i in layers) + rest
        # Full layers pass their surplus on, like the remainder of the division.
        total = min(wanted // unit, sum(rooms))
        rest = wanted - total * unit
        shares = apportion(total, [counts[i] for i in layers], rooms, [1] * len(layers))
        for i, share in zip(layers, shares, strict=True):
            result[i] = share
    return result
