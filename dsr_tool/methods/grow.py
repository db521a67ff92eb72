"""Growing: chooses free positions to activate, each equally likely, exactly as many as asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch

from dsr_tool.sparse.active import ActiveWeights, Positions, segment_counts

__all__ = ["anywhere", "at_random", "distinct", "regrow"]


def at_random(weights: ActiveWeights, counts: Sequence[int], generator: torch.Generator) -> Positions:
    """Chooses free positions uniformly without replacement, `counts[i]` in layer i.

    Free means inactive before this update: a weight that was just pruned is not among them. The cost grows with the
    active weights and the weights grown, not with all weights.

    Args:
        weights: the active weights before anything was pruned.
        counts: number of positions per layer, at most `weights.free`.
        generator: source of randomness, on the device of the weights.
    """
    ranks = distinct(counts, weights.free, generator)
    occupied = weights.positions.flat
    # The j-th occupied position has occupied[j] - j free ones before it. So the number of occupied positions before
    # the free position of rank r is found by a binary search, without a list of all free positions.
    free_before = occupied - torch.arange(len(occupied), device=occupied.device)
    chosen = ranks + torch.searchsorted(free_before, ranks, right=True)
    return Positions(weights.sizes, tuple(counts), chosen)


def anywhere(weights: ActiveWeights, count: int, generator: torch.Generator) -> Positions:
    """Chooses `count` of all free positions of the network uniformly without replacement, in whatever layers."""
    whole = Positions((sum(weights.sizes),), (sum(weights.counts),), weights.positions.flat)
    chosen = at_random(ActiveWeights(whole, weights.values), [count], generator)
    return Positions.of(chosen.flat, weights.sizes)


def regrow(
    weights: ActiveWeights, drop: torch.Tensor, scores: Sequence[torch.Tensor], counts: Sequence[int]
) -> tuple[Positions, Positions]:
    """Grows where a score is largest, layer by layer, among free positions and those of weights that are pruned.

    A pruned weight that is chosen again is neither pruned nor grown: it stays, with its value, as in the code of RigL.

    Args:
        weights: the active weights.
        drop: boolean vector over them, True for those to prune; changed in place.
        scores: a number for each position of each layer, flat, shapes (size,), such as dense gradients; magnitudes
            count.
        counts: number of positions to choose in each layer.

    Returns:
        The positions that are pruned, and those that grow.
    """
    grow = torch.zeros(sum(weights.sizes), dtype=torch.bool, device=drop.device)
    starts, bounds = accumulate(weights.sizes, initial=0), accumulate(weights.counts, initial=0)
    for start, bound, active, score, count in zip(starts, bounds, weights.counts, scores, counts, strict=False):
        if count:
            segment = slice(bound, bound + active)
            local = weights.positions.flat[segment] - start
            chosen = _largest(score, local, drop[segment], count)
            drop[segment] &= ~chosen[local]
            chosen[local] = False
            grow[start : start + len(chosen)] = chosen
    return (
        Positions.of(weights.positions.flat[drop], weights.sizes),
        Positions.of(grow.nonzero().squeeze(1), weights.sizes),
    )


def _largest(values: torch.Tensor, active: torch.Tensor, drop: torch.Tensor, count: int) -> torch.Tensor:
    """Returns True at the `count` largest magnitudes of a layer among free positions and those of pruned weights.

    Of equal magnitudes the first positions are taken, as in the authors' code, on every device.

    Args:
        values: a number for each position of the layer, shape (size,).
        active: active positions in the layer, shape (active,).
        drop: boolean vector over `active`, True for weights to prune.
        count: number of positions to choose.
    """
    # NaN counts as the largest magnitude, as in a sort: if it counted as none, fewer than `count` positions would be
    # chosen, and the layer would lose weights.
    score = values.abs().nan_to_num_(nan=torch.inf, posinf=torch.inf)
    score[active] = torch.where(drop, score[active], -1.0)
    # topk breaks ties in another way on each device. So only its smallest value is used, and ties are broken here.
    least = score.topk(count, sorted=False).values.min()
    chosen, ties = score > least, score == least
    return chosen | (ties & (ties.cumsum(0, dtype=torch.int32) <= count - chosen.count_nonzero()))


def distinct(counts: Sequence[int], rooms: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """Draws distinct random integers per segment, every subset equally likely.

    Args:
        counts: number of integers to draw in each segment, at most its room.
        rooms: size of each segment; segment i holds the integers from sum(rooms[:i]) on.
        generator: source of randomness.

    Returns:
        Sorted int64 vector of sum(counts) integers, on the generator's device.
    """
    starts = [0, *accumulate(rooms)]
    if not any(counts):
        return torch.empty(0, dtype=torch.int64, device=generator.device)
    found = torch.unique(_draws(counts, rooms, starts, generator))
    got = segment_counts(found, rooms)
    # A segment rarely has too few integers after one round of draws. Then, and if more than half of a segment is
    # wanted, all its integers are listed instead, and `_thin` chooses among them.
    short = [i for i, (have, want) in enumerate(zip(got, counts, strict=True)) if have < want]
    if short:
        whole = [torch.arange(starts[i], starts[i + 1], device=found.device) for i in short]
        found = torch.unique(torch.cat([found, *whole]))
        got = segment_counts(found, rooms)
    return _thin(found, got, counts, generator)


def _draws(
    counts: Sequence[int], rooms: Sequence[int], starts: Sequence[int], generator: torch.Generator
) -> torch.Tensor:
    """Draws with replacement, enough for `counts` distinct integers nearly always; none if more than half is wanted."""
    draws = [_enough(count, room) if count * 2 <= room else 0 for count, room in zip(counts, rooms, strict=True)]
    device = generator.device
    times = torch.tensor(draws, device=device)
    total = sum(draws)
    # output_size, because without it repeat_interleave waits for a GPU to know the length of its result.
    room = torch.tensor(list(rooms), device=device).repeat_interleave(times, output_size=total)
    start = torch.tensor(starts[:-1], device=device).repeat_interleave(times, output_size=total)
    uniform = torch.rand(total, dtype=torch.float64, device=device, generator=generator)
    # The product can round up to `room`, which is in the next segment.
    return start + torch.minimum((uniform * room).long(), room - 1)


def _enough(count: int, room: int) -> int:
    """Returns the number of draws whose expected number of distinct values is `count`, plus three deviations."""
    if count == 0:
        return 0
    expected = -room * math.log1p(-count / room)
    return math.ceil(expected + 3 * math.sqrt(expected) + 3)


def _thin(found: torch.Tensor, got: Sequence[int], counts: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """Returns a random subset of the sorted `found`: `counts[i]` of the `got[i]` integers in each segment."""
    excess = [have - want for have, want in zip(got, counts, strict=True)]
    if sum(excess) * 4 < len(found):
        # Choosing the few to remove is the same problem on fewer integers, and saves a sort of random keys for all.
        keep = torch.ones_like(found, dtype=torch.bool)
        keep[distinct(excess, got, generator)] = False
        return found[keep]
    device = found.device
    sizes = torch.tensor(got, device=device)
    segment = torch.arange(len(got), device=device).repeat_interleave(sizes, output_size=len(found))
    # Integer part: the segment; fraction: random. Sorting shuffles within segments and keeps segments in order, so
    # entry k of the sorted keys belongs to the segment of entry k here.
    keys = segment + torch.rand(len(found), dtype=torch.float64, device=device, generator=generator)
    rank = torch.arange(len(found), device=device) - torch.tensor([0, *accumulate(got)], device=device)[segment]
    wanted = torch.tensor(list(counts), device=device)[segment]
    chosen: torch.Tensor = found[torch.argsort(keys)[rank < wanted]].sort().values
    return chosen
