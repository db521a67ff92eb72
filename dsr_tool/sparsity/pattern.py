"""The pattern that a mask has, whatever made it: N:M, whole kernels, or as many active weights in every output."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from dsr_tool.sparsity.granularity import MOST_GROUP, Blocks, Granularity
from dsr_tool.sparsity.mask import Mask

__all__ = ["found_groups", "found_pattern", "pattern_bits"]


def found_pattern(mask: Mask) -> Granularity | None:
    """Returns the first of N:M, kernel and fan-in that a mask has; None for a full, an empty or any other mask."""
    if not 0 < mask.active < mask.size or len(mask.shape) < 2:
        return None
    inputs, groups = math.prod(mask.shape[1:]), found_groups(mask)
    # Groups of all inputs are fan-in.
    if groups is not None and groups.group < inputs:
        return groups
    for kind in ("kernel", "fan-in"):
        granularity = Granularity(kind)
        # One output has a fan-in of its own, and a kernel of one weight is no kernel.
        size = granularity.unit(mask.shape) if kind == "kernel" else inputs
        trivial = size in (1, mask.size)
        if not trivial and _is_whole(mask, size, by_output=kind == "fan-in"):
            return granularity
    return None


def found_groups(mask: Mask) -> Granularity | None:
    """Returns the pattern N:M with the smallest M up to 64 that a mask has; None for a full, an empty or any other."""
    if not 0 < mask.active < mask.size or len(mask.shape) < 2:
        return None
    density = Fraction(mask.active, mask.size)
    for group in range(density.denominator, MOST_GROUP + 1, density.denominator):
        kept = group * density.numerator // density.denominator
        if mask.shape[1] % group == 0 and (_counts(mask, group) == kept).all():
            return Granularity("N:M", kept, group)
    return None


def pattern_bits(mask: Mask) -> float:
    """Returns the bits that any code needs for a mask if its count is known, and its pattern where it is N:M."""
    groups = found_groups(mask)
    if groups is None:
        return mask.entropy_bound_bits
    return mask.size // groups.group * math.log2(math.comb(groups.group, groups.kept))


def _counts(mask: Mask, group: int) -> npt.NDArray[np.int64]:
    """Returns the number of active entries of each group of input channels, in O(active)."""
    blocks = Blocks.of(mask.shape, group)
    rest, tap = np.divmod(mask.positions, blocks.taps)
    output, channel = np.divmod(rest, blocks.inputs)
    numbers = (output * blocks.taps + tap) * (blocks.inputs // group) + channel // group
    return np.bincount(numbers, minlength=blocks.count)


def _is_whole(mask: Mask, size: int, *, by_output: bool) -> bool:
    """Returns whether runs of `size` positions all have as many active entries, or else each has all or none."""
    counts = np.bincount(mask.positions // size, minlength=mask.size // size)
    return bool((counts == counts[0]).all() if by_output else (counts % size == 0).all())
