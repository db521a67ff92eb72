"""The pattern that a mask has, whatever made it: N:M, whole kernels, or as many active weights in every output."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from dsr_tool.sparsity.granularity import MOST_GROUP, Granularity
from dsr_tool.sparsity.mask import Mask

__all__ = ["found_groups", "found_pattern", "pattern_bits"]

_CHUNK = 1 << 20
"""Entries that are looked at together: 40 MiB of whole numbers, however large the layer."""


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
        if mask.shape[1] % group == 0 and _has_groups(mask, group, kept):
            return Granularity("N:M", kept, group)
    return None


def pattern_bits(mask: Mask) -> float:
    """Returns the bits that any code needs for a mask if its count is known, and its pattern where it is N:M."""
    groups = found_groups(mask)
    if groups is None:
        return mask.entropy_bound_bits
    return mask.size // groups.group * math.log2(math.comb(groups.group, groups.kept))


def _has_groups(mask: Mask, group: int, kept: int) -> bool:
    """Returns whether every group of input channels has `kept` active entries, in O(active)."""
    inputs, taps, positions = mask.shape[1], math.prod(mask.shape[2:]), mask.positions
    step = max(_CHUNK // (inputs * taps), 1)
    for first in range(0, mask.shape[0], step):
        outputs = min(step, mask.shape[0] - first)
        ends = np.searchsorted(positions, [first * inputs * taps, (first + outputs) * inputs * taps])
        rest, tap = np.divmod(positions[slice(*ends)] - first * inputs * taps, taps)
        # Input channels divide into groups, so a group is known by the place of its first channel among all.
        numbers = rest // group * taps + tap
        # Nearly every mask that has no groups is known by its first outputs.
        if (np.bincount(numbers, minlength=outputs * inputs // group * taps) != kept).any():
            return False
    return True


def _is_whole(mask: Mask, size: int, *, by_output: bool) -> bool:
    """Returns whether runs of `size` positions all have as many active entries, or else each has all or none."""
    counts = np.bincount(mask.positions // size, minlength=mask.size // size)
    return bool((counts == counts[0]).all() if by_output else (counts % size == 0).all())
