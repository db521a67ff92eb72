"""Granularity: the unit that is active or inactive as a whole, a single weight or a kernel of a convolution."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dsr_tool.sparsity.apportion import apportion

__all__ = ["GRANULARITIES", "groups", "unit_size", "whole_units"]

GRANULARITIES = ("weight", "kernel")
"""Values of `--granularity`."""


def unit_size(shape: Sequence[int], granularity: str) -> int:
    """Returns the number of weights per unit: 1, or kh * kw for the kernels of a convolution.

    Weights with two dimensions (linear layers, embeddings, attention) are single at every granularity, as in the code
    of Mostafa & Wang 2019.
    """
    return math.prod(shape[2:]) if granularity == "kernel" else 1


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
