"""Pruning: chooses active weights to drop, as boolean vectors over the active weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch

from dsr_tool.sparse.active import ActiveWeights

__all__ = ["below_threshold", "cosine", "drop_counts", "keep_at_least", "smallest", "smallest_of_all"]


def cosine(first: float, step: int, last: int) -> float:
    """Returns a share that falls with a cosine from `first` at step 0 to zero at step `last`."""
    return first / 2 * (1 + math.cos(math.pi * min(step / max(last, 1), 1)))


def below_threshold(weights: ActiveWeights, threshold: float) -> torch.Tensor:
    """Returns True for each active weight with |w| < threshold (Mostafa & Wang 2019, Algorithm 1, step 1)."""
    return weights.values.abs() < threshold


def drop_counts(fraction: float, counts: Sequence[int], free: Sequence[int]) -> list[int]:
    """Returns how many weights each layer prunes: its share rounded down, plus one, as in the code of Mostafa & Wang.

    The one matters where few weights are left: 10 weights and 0.14 make 2. At least one weight of a layer stays, and
    no more are pruned than there are free positions, since a pruned weight must not grow again in the same update.

    Args:
        fraction: share of the active weights.
        counts: number of active weights per layer.
        free: number of positions per layer that may grow.
    """
    wanted = (int(fraction * active) + 1 for active in counts)
    return [min(want, max(active - 1, 0), room) for want, active, room in zip(wanted, counts, free, strict=True)]


def keep_at_least(weights: ActiveWeights, drop: torch.Tensor, groups: Sequence[Sequence[int]]) -> torch.Tensor:
    """Keeps some of the weights in `drop`, so that no layer becomes empty and each group has room to grow again.

    The largest magnitudes are kept: one in each layer that would be empty, then in each group as many as exceed its
    free positions.

    Args:
        weights: the active weights.
        drop: boolean vector over them, True for those to prune.
        groups: indices of the layers that share what they pruned.

    Returns:
        A boolean vector like `drop`.
    """
    bounds = [0, *accumulate(weights.counts)]
    edges = torch.tensor(bounds, device=drop.device)
    # Weights to prune per layer, as differences of a running count: one transfer to the host serves all layers.
    running = torch.cat([drop.new_zeros(1, dtype=torch.int64), drop.cumsum(0)])
    dropped: list[int] = torch.diff(running[edges]).tolist()
    reduced = drop.clone()
    magnitude = weights.values.abs()
    for i, count in enumerate(dropped):
        if count and count == weights.counts[i]:
            reduced[bounds[i] + magnitude[bounds[i] : bounds[i + 1]].argmax()] = False
            dropped[i] -= 1
    free = weights.free
    for layers in groups:
        # As many weights must grow as were pruned, and a pruned weight must not grow again in the same update.
        excess = sum(dropped[i] - free[i] for i in layers)
        if excess > 0:
            segments = [reduced[bounds[i] : bounds[i + 1]].nonzero().squeeze(1) + bounds[i] for i in layers]
            candidates = torch.cat(segments)
            reduced[candidates[magnitude[candidates].topk(excess).indices]] = False
    return reduced


def smallest(weights: ActiveWeights, counts: Sequence[int]) -> torch.Tensor:
    """Returns True for the `counts[i]` smallest magnitudes among the active weights of each layer i.

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
    """Returns True for the `count` smallest magnitudes of the whole network; the largest of each layer always stays.

    Args:
        weights: the active weights, at least `count` plus the number of layers.
        count: number of weights to prune.
    """
    magnitude = weights.values.abs()
    bounds = [0, *accumulate(weights.counts)]
    largest = [first + magnitude[first:end].argmax() for first, end in pairwise(bounds) if first < end]
    # One assignment for all layers: with one for each, the host would wait for a GPU each time.
    magnitude[torch.stack(largest)] = torch.inf
    drop = torch.zeros_like(magnitude, dtype=torch.bool)
    if count:
        drop[magnitude.topk(count, largest=False, sorted=False).indices] = True
    return drop
