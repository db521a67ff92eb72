"""Validates a Reallocation before it is applied: counts always, positions too for plugin methods."""

from __future__ import annotations

import torch

from dsr_tool.errors import CheckFailed
from dsr_tool.methods.base import Method, Reallocation
from dsr_tool.methods.final_sparsity import active_count
from dsr_tool.sparse.active import ActiveWeights, segment_counts
from dsr_tool.sparse.pattern import split_blocks
from dsr_tool.sparsity.granularity import groups

__all__ = ["check_counts", "check_density", "check_positions"]


def check_counts(name: str, weights: ActiveWeights, moved: Reallocation) -> None:
    """Checks the counts of a reallocation, which are on the host, so that a GPU is never waited for.

    Args:
        name: name of the method, for the message.
        weights: the weights that the method was given.
        moved: the method's answer.

    Raises:
        CheckFailed: the answer is not a `Reallocation`, or a layer prunes more weights than it has or grows more than
            it has room for.
    """
    if not isinstance(moved, Reallocation):
        raise CheckFailed(f"method {name} returned {type(moved).__name__} from update(), expected a Reallocation.")
    for verb, positions, room in (("drop", moved.dropped, weights.counts), ("grow", moved.grown, weights.free)):
        if positions.sizes != weights.sizes or sum(positions.counts) != len(positions.flat):
            raise CheckFailed(f"method {name} gave positions to {verb} whose counts do not fit the network.")
        for i, (count, most) in enumerate(zip(positions.counts, room, strict=True)):
            if not 0 <= count <= most:
                raise CheckFailed(
                    f"method {name} wants to {verb} {count:,} weights in layer {i}, which has {most:,} to {verb}."
                )


def check_positions(name: str, weights: ActiveWeights, moved: Reallocation) -> None:
    """Checks every position of a reallocation that passed `check_counts`, at O(moved * log(active)).

    The tests hold the methods of this package to the same rules, so that a training need not pay for it.

    Args:
        name: name of the method, for the message.
        weights: the weights that the method was given.
        moved: the method's answer.

    Raises:
        CheckFailed: a position is not in its layer, not in rising order, pruned though inactive or grown though
            active; a layer is emptied; a block of fan-in or N:M gets more or fewer weights; or the values have another
            shape.
    """
    active = weights.positions.flat
    for verb, positions in (("drop", moved.dropped), ("grow", moved.grown)):
        flat = positions.flat
        if flat.dtype != torch.int64 or segment_counts(flat, positions.sizes) != list(positions.counts):
            raise CheckFailed(f"method {name} gave positions to {verb} that are not int64, or in other layers.")
        if not bool((flat[1:] > flat[:-1]).all()):
            raise CheckFailed(f"method {name} gave positions to {verb} that do not rise.")
        # Known to rise by now, as the binary search needs.
        is_active = _contains(active, flat)
        if not bool((is_active if verb == "drop" else ~is_active).all()):
            state = "not active" if verb == "drop" else "not free"
            raise CheckFailed(f"method {name} wants to {verb} a weight that is {state}.")
    for i, had in enumerate(weights.counts):
        if had and had == moved.dropped.counts[i] - moved.grown.counts[i]:
            raise CheckFailed(f"method {name} empties layer {i}; each layer keeps at least one weight.")
    _check_blocks(name, weights, moved)
    values = moved.values
    if values is not None and (values.shape != active.shape or values.dtype != torch.float32):
        raise CheckFailed(
            f"method {name} gave {values.dtype} values of shape {tuple(values.shape)}, expected torch.float32 of shape "
            f"{tuple(active.shape)}."
        )


def check_density(name: str, method: Method, weights: ActiveWeights, moved: Reallocation, step: int) -> None:
    """Checks that a reallocation leaves as many active weights as the method declares, to the last one.

    Args:
        name: name of the method, for the message.
        method: the method.
        weights: the weights that it was given.
        moved: its answer, which passed `check_counts`.
        step: the optimizer step of the update.

    Raises:
        CheckFailed: the number changes though the method declares no final sparsity, or is not that of its declared
            sparsity.
    """
    if method.final_sparsity is None:
        _check_kept(name, weights, moved)
    elif (sparsity := method.sparsity(step)) is not None:
        left = sum(weights.counts) - len(moved.dropped.flat) + len(moved.grown.flat)
        declared = active_count(sparsity, weights.sizes)
        if left != declared:
            raise CheckFailed(
                f"method {name} leaves {left:,} active weights after step {step}, but its sparsity there, "
                f"{float(sparsity):.6g}, means {declared:,}."
            )


def _check_kept(name: str, weights: ActiveWeights, moved: Reallocation) -> None:
    # Layers with kernels of different sizes have budgets of their own: a 3x3 kernel for a 1x1 kernel would change the
    # number of weights.
    units = weights.units or (1,) * len(weights.sizes)
    for layers in groups(units):
        lost, got = (sum(positions.counts[i] for i in layers) for positions in (moved.dropped, moved.grown))
        if lost != got:
            raise CheckFailed(
                f"method {name} drops {lost:,} weights and grows {got:,}, which changes the budget; a method that "
                f"changes it declares a final_sparsity."
            )


def _check_blocks(name: str, weights: ActiveWeights, moved: Reallocation) -> None:
    pieces = zip(weights.blocks, weights.sizes, moved.dropped.per_layer(), moved.grown.per_layer(), strict=False)
    for i, (blocks, size, lost, got) in enumerate(pieces):
        balance = torch.zeros(size, dtype=torch.int8, device=lost.device)
        balance[lost], balance[got] = -1, 1
        if bool(split_blocks(balance, blocks).sum(1).any()):
            raise CheckFailed(
                f"method {name} changes the number of active weights of an output or a group in layer {i}; at fan-in "
                f"and N:M, each grows as many as it prunes."
            )


def _contains(active: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
    """Returns a boolean vector like `flat`, True for each position in the sorted vector `active`."""
    if not len(active):
        return torch.zeros_like(flat, dtype=torch.bool)
    at = torch.searchsorted(active, flat).clamp_(max=len(active) - 1)
    return active[at] == flat
