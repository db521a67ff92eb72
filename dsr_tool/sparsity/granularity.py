"""What is active or inactive as a whole: single weights, or the kernels of convolutions."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dsr_tool.sparsity.budget import apportion

__all__ = ["GRANULARITIES", "groups", "unit_size", "whole_units"]

GRANULARITIES = ("weight", "kernel")


def unit_size(shape: Sequence[int], granularity: str) -> int:
    """Weights that are active or inactive together: the last dimensions of a convolution's weight, kh * kw.

    Weights of two dimensions (linear layers, embeddings, attention) are single at every granularity, as in the code of
    Mostafa & Wang 2019.
    """
    return math.prod(shape[2:]) if granularity == "kernel" else 1


def groups(units: Sequence[int]) -> list[list[int]]:
    """Numbers of the layers whose units are of one size, largest units first.

    Within a group units can move from layer to layer and the number of weights stays the same.
    """
    return [[i for i, unit in enumerate(units) if unit == size] for size in sorted(set(units), reverse=True)]


def whole_units(counts: Sequence[int], sizes: Sequence[int], units: Sequence[int]) -> list[int]:
    """Turn active weights per layer into whole units per layer.

    Each group of layers with equal units gets as many units as its weights make; the weights that are left go to the
    next smaller units, so that the total is met exactly where single weights have room, and otherwise from below.

    Args:
        counts: active weights per layer; their sum is at least that of `units`.
        sizes: weights per layer.
        units: weights per unit, by layer.

    Returns:
        Units per layer, at least one each, in the proportions of `counts`.
    """
    counts = apportion(sum(counts), counts, sizes, units)
    found, left = [0] * len(counts), 0
    for layers in groups(units):
        unit = units[layers[0]]
        rooms = [sizes[i] // unit for i in layers]
        wanted = sum(counts[i] for i in layers) + left
        total = min(wanted // unit, sum(rooms))
        left = wanted - total * unit
        shares = apportion(total, [counts[i] for i in layers], rooms, [1] * len(layers))
        for i, share in zip(layers, shares, strict=True):
            found[i] = share
    return found
