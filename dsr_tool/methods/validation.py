"""Is what a method wants to move possible? Cheap enough for every update, and in full for methods of others."""

from __future__ import annotations

import torch

from dsr_tool.errors import CheckFailed
from dsr_tool.methods.base import Reallocation
from dsr_tool.sparse.active import ActiveWeights, Positions, segment_counts
from dsr_tool.sparsity.granularity import groups

__all__ = ["check_counts", "check_moves"]


def check_counts(name: str, weights: ActiveWeights, moved: Reallocation) -> None:
    """Raise `CheckFailed` unless every layer drops what it has and grows where it has room; it reads nothing of a GPU.

    Args:
        name: of the method, for the message.
        weights: what the method saw.
        moved: what it answered.
    """
    for what, positions, room in (("drop", moved.dropped, weights.counts), ("grow", moved.grown, weights.free)):
        if positions.sizes != weights.sizes or sum(positions.counts) != len(positions.flat):
            raise CheckFailed(f"method {name} gave positions to {what} whose counts do not fit the network.")
        for i, (count, most) in enumerate(zip(positions.counts, room, strict=True)):
            if not 0 <= count <= most:
                raise CheckFailed(
                    f"method {name} wants to {what} {count:,} weights in layer {i}, which has {most:,} to {what}."
                )


def check_moves(name: str, weights: ActiveWeights, moved: object) -> Reallocation:
    """The same and more, at O(moved * log(active)): each position is right, and the number of weights stays the same.

    Raises:
        CheckFailed: it is no `Reallocation`, drops what is not active, grows what is not free, changes the budget, or
            gives values of another shape.
    """
    if not isinstance(moved, Reallocation):
        raise CheckFailed(f"method {name} answered {type(moved).__name__} instead of a Reallocation.")
    check_counts(name, weights, moved)
    active = weights.positions.flat
    for what, positions in (("drop", moved.dropped), ("grow", moved.grown)):
        flat = positions.flat
        if flat.dtype != torch.int64 or segment_counts(flat, positions.sizes) != list(positions.counts):
            raise CheckFailed(f"method {name} gave positions to {what} that are not int64, or in other layers.")
        if not bool((flat[1:] > flat[:-1]).all()):
            raise CheckFailed(f"method {name} gave positions to {what} that do not rise.")
        there = _is_among(flat, active)
        if not bool((there if what == "drop" else ~there).all()):
            state = "not active" if what == "drop" else "not free"
            raise CheckFailed(f"method {name} wants to {what} a weight that is {state}.")
    _check_budget(name, weights, moved.dropped, moved.grown)
    values = moved.values
    if values is not None and (values.shape != active.shape or values.dtype != torch.float32):
        raise CheckFailed(
            f"method {name} gave {values.dtype} values of shape {tuple(values.shape)}, no float32 vector."
        )
    return moved


def _is_among(flat: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
    """True for each sorted position that is an active one."""
    if not len(active):
        return torch.zeros_like(flat, dtype=torch.bool)
    at = torch.searchsorted(active, flat).clamp_(max=len(active) - 1)
    return active[at] == flat


def _check_budget(name: str, weights: ActiveWeights, dropped: Positions, grown: Positions) -> None:
    units = weights.units or (1,) * len(weights.sizes)
    for layers in groups(units):
        lost, got = (sum(positions.counts[i] for i in layers) for positions in (dropped, grown))
        if lost != got:
            raise CheckFailed(f"method {name} drops {lost:,} weights and grows {got:,}, which changes the budget.")
    for i, had in enumerate(weights.counts):
        if had and had == dropped.counts[i] - grown.counts[i]:
            raise CheckFailed(f"method {name} empties layer {i}; each layer keeps at least one weight.")
