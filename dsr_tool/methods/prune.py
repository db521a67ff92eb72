"""Which active weights to drop."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch

from dsr_tool.sparse.active import ActiveWeights

__all__ = ["below_threshold", "keep_at_least", "smallest", "smallest_of_all"]


def below_threshold(weights: ActiveWeights, threshold: float) -> torch.Tensor:
    """True for each active weight with |w| < threshold (Mostafa & Wang 2019, Algorithm 1, step 1)."""
    return weights.values.abs() < threshold


def keep_at_least(weights: ActiveWeights, drop: torch.Tensor, groups: Sequence[Sequence[int]]) -> torch.Tensor:
    """Take weights back from `drop` so that no layer is emptied and each group of layers has room to regrow.

    The largest magnitudes are taken back: one of each layer that would be empty, then of each group as many as exceed
    its free positions.

    Args:
        weights: the active weights.
        drop: boolean vector over them, True for those to drop.
        groups: numbers of the layers that share what they dropped.

    Returns:
        A boolean vector like `drop`.
    """
    bounds = [0, *accumulate(weights.counts)]
    edges = torch.tensor(bounds, device=drop.device)
    # Dropped per layer as differences of a running count, so that one trip to the host serves all layers.
    running = torch.cat([drop.new_zeros(1, dtype=torch.int64), drop.cumsum(0)])
    dropped: list[int] = torch.diff(running[edges]).tolist()
    keep = drop.clone()
    magnitude = weights.values.abs()
    for i, count in enumerate(dropped):
        if count and count == weights.counts[i]:
            keep[bounds[i] + magnitude[bounds[i] : bounds[i + 1]].argmax()] = False
            dropped[i] -= 1
    free = weights.free
    for layers in groups:
        excess = sum(dropped[i] - free[i] for i in layers)
        if excess > 0:
            candidates = torch.cat([keep[bounds[i] : bounds[i + 1]].nonzero().squeeze(1) + bounds[i] for i in layers])
            keep[candidates[magnitude[candidates].topk(excess).indices]] = False
    return keep


def smallest(weights: ActiveWeights, counts: Sequence[int]) -> torch.Tensor:
    """True for the `counts[i]` smallest magnitudes among the active weights of each layer i.

    The cost is a selection among the active weights, not a sort.
    """
    drop = torch.zeros_like(weights.values, dtype=torch.bool)
    bounds = [0, *accumulate(weights.counts)]
    for i, count in enumerate(counts):
        if count:
            magnitude = weights.values[bounds[i] : bounds[i + 1]].abs()
            drop[bounds[i] + magnitude.topk(count, largest=False, sorted=False).indices] = True
    return drop


def smallest_of_all(weights: ActiveWeights, count: int) -> torch.Tensor:
    """True for the `count` smallest magnitudes of the whole network; the largest of each layer always stays.

    Args:
        weights: the active weights, more than `count` and the number of layers together.
        count: how many.
    """
    magnitude = weights.values.abs()
    bounds = [0, *accumulate(weights.counts)]
    largest = [first + magnitude[first:end].argmax() for first, end in pairwise(bounds) if first < end]
    # All at once: an assignment to each would make the host wait for a GPU.
    magnitude[torch.stack(largest)] = torch.inf
    drop = torch.zeros_like(magnitude, dtype=torch.bool)
    if count:
        drop[magnitude.topk(count, largest=False, sorted=False).indices] = True
    return drop
