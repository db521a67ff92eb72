"""Chooses which weights of a layer are active: the largest or any, wherever its granularity allows."""

from __future__ import annotations

import torch

from dsr_tool.sparsity.distribution import largest, largest_of_each
from dsr_tool.sparsity.granularity import Blocks, Granularity

__all__ = ["POSITIONS", "choose"]

POSITIONS = ("magnitude", "random")
"""Ways to choose the active weights of a layer: the largest, or any."""


def choose(
    weight: torch.Tensor, active: int, granularity: Granularity, positions: str, generator: torch.Generator
) -> torch.Tensor:
    """Returns a mask with exactly `active` entries in the pattern of the granularity.

    Args:
        weight: what ranks the weights of the layer, by magnitude.
        active: number of active weights, a multiple of the granularity's step.
        granularity: the pattern.
        positions: `magnitude` for the largest, or `random`. Random positions of a smaller number are part of those of a
            larger one.
        generator: source of randomness, on the CPU.

    Returns:
        A boolean tensor of the weight's shape, device and memory format.
    """
    unit, blocks = granularity.unit(weight.shape), granularity.blocks(weight.shape)
    if blocks is not None:
        mask = _choose_in_blocks(weight, active, blocks, positions, generator)
    elif positions == "random":
        # A permutation of all units, not a sample of `active`: smaller samples are then part of larger ones.
        chosen = torch.randperm(weight.numel() // unit, generator=generator)[: active // unit]
        mask = _whole(chosen, weight.numel() // unit, unit)
    else:
        magnitude = weight.detach().float().abs().reshape(-1, unit).mean(1).cpu().numpy()
        mask = _whole(torch.from_numpy(largest(magnitude, active // unit)), weight.numel() // unit, unit)
    return torch.empty_like(weight, dtype=torch.bool).copy_(mask.reshape(weight.shape))


def _choose_in_blocks(
    weight: torch.Tensor, active: int, blocks: Blocks, positions: str, generator: torch.Generator
) -> torch.Tensor:
    """Returns a mask with as many active entries in every block, in row-major order."""
    if positions == "random":
        # Keys for all positions: a smaller number of the largest is then part of a larger one.
        scores = torch.rand(blocks.count, blocks.size, generator=generator).numpy()
    else:
        scores = blocks.split(weight.detach().float().abs().cpu().numpy())
    return torch.from_numpy(blocks.join(largest_of_each(scores, active // blocks.count)))


def _whole(chosen: torch.Tensor, count: int, unit: int) -> torch.Tensor:
    """Returns the mask of the chosen units among `count`, shape (count, unit)."""
    mask = torch.zeros(count, unit, dtype=torch.bool)
    mask[chosen] = True
    return mask
