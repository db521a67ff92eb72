"""Moves inside blocks: every output keeps its fan-in, and every group of N:M its N."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate

import torch

from dsr_tool.sparse.active import ActiveWeights, Positions
from dsr_tool.sparse.pattern import join_blocks, split_blocks

__all__ = ["grow_in_blocks", "with_room"]


def grow_in_blocks(
    weights: ActiveWeights, drop: torch.Tensor, scores: Iterable[torch.Tensor], *, again: bool
) -> tuple[Positions, Positions]:
    """Grows in every block as many weights as are pruned there, where a score is largest.

    Args:
        weights: the active weights, with blocks.
        drop: boolean vector over them, True for those to prune; changed in place.
        scores: a number for each position of each layer, flat, shapes (size,), read one layer at a time; magnitudes
            count.
        again: whether pruned weights may be chosen too; those that are stay, with their values, as in `regrow`.

    Returns:
        The positions that are pruned, and those that grow.
    """
    grow = torch.zeros(sum(weights.sizes), dtype=torch.bool, device=drop.device)
    starts, bounds = accumulate(weights.sizes, initial=0), accumulate(weights.counts, initial=0)
    locals_ = weights.positions.per_layer()
    for start, bound, local, score, blocks in zip(starts, bounds, locals_, scores, weights.blocks, strict=False):
        segment = drop[bound : bound + len(local)]
        active, dropped = (torch.zeros(len(score), dtype=torch.bool, device=drop.device) for _ in range(2))
        active[local], dropped[local] = True, segment
        # NaN counts as the largest magnitude, as in `regrow`: every block must get back what it lost.
        rows = score.abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
        rows = rows.masked_fill(active & ~dropped if again else active, -1.0)
        counts = split_blocks(dropped, blocks).sum(1)
        chosen = join_blocks(_largest_of_each(split_blocks(rows, blocks), counts), blocks)
        segment &= ~chosen[local]
        grow[start : start + len(score)] = chosen & ~active
    return (
        Positions.of(weights.positions.flat[drop], weights.sizes),
        Positions.of(grow.nonzero().squeeze(1), weights.sizes),
    )


def with_room(weights: ActiveWeights, drop: torch.Tensor) -> torch.Tensor:
    """Keeps the largest of the weights in `drop` in every block that has fewer free positions than it would prune.

    Args:
        weights: the active weights, with blocks.
        drop: boolean vector over them, True for those to prune.

    Returns:
        A boolean vector like `drop`.
    """
    reduced = drop.clone()
    bounds = accumulate(weights.counts, initial=0)
    for bound, local, size, blocks in zip(
        bounds, weights.positions.per_layer(), weights.sizes, weights.blocks, strict=False
    ):
        segment = slice(bound, bound + len(local))
        magnitude = torch.full((size,), -1.0, device=drop.device)
        magnitude[local] = torch.where(drop[segment], weights.values[segment].abs(), -1.0)
        rows = split_blocks(magnitude, blocks)
        free = blocks.size - len(local) // blocks.count
        excess = ((rows >= 0).sum(1) - free).clamp_min(0)
        reduced[segment] &= ~join_blocks(_largest_of_each(rows, excess), blocks)[local]
    return reduced


def _largest_of_each(rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Returns True at the `counts[i]` largest entries of each row i; of equal entries the first, on every device.

    Args:
        rows: scores, shape (rows, n).
        counts: number of entries to choose of each row, shape (rows,), at most n.
    """
    most = int(counts.max()) if len(counts) else 0
    if not most:
        return torch.zeros_like(rows, dtype=torch.bool)
    # Ties are broken here: topk breaks them in another way on each device, so only its values are used.
    least = rows.topk(most).values.gather(1, (counts - 1).clamp_min(0)[:, None])
    least = least.masked_fill((counts == 0)[:, None], torch.inf)
    chosen, ties = rows > least, rows == least
    missing = (counts - chosen.sum(1))[:, None]
    return chosen | (ties & (ties.cumsum(1, dtype=torch.int32) <= missing))
