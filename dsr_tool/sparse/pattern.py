"""Masks in the pattern of a granularity: whole kernels, or as many active weights in every block."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dsr_tool.sparsity.granularity import SINGLE, UNSTRUCTURED, Blocks, Granularity

__all__ = ["join_blocks", "largest_of_rows", "split_blocks", "torn_layer"]


def split_blocks(tensor: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """Returns a tensor of a weight's size as one row per block, shape (blocks, positions of a block)."""
    by_output = tensor.reshape(blocks.outputs, blocks.inputs, blocks.taps)
    return by_output.transpose(1, 2).reshape(blocks.count, blocks.size)


def join_blocks(rows: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """Returns the flat tensor, in row-major order of the weight, that `split_blocks` took apart."""
    return rows.reshape(blocks.outputs, blocks.taps, blocks.inputs).transpose(1, 2).reshape(-1)


def largest_of_rows(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Returns True at the `count` largest entries of each row, shape (rows, n); of equal entries any may be chosen."""
    chosen = rows.topk(count, sorted=False).indices
    return torch.zeros_like(rows, dtype=torch.bool).scatter_(1, chosen, True)


def torn_layer(masks: Mapping[str, torch.Tensor], granularity: Granularity) -> str | None:
    """Returns the name of the first mask without the pattern of a granularity; None if all have it.

    With fan-in any number per output is the pattern, as long as all outputs have it.
    """
    if granularity == SINGLE:
        return None
    return next((name for name, mask in masks.items() if not _has_pattern(mask, granularity)), None)


def _has_pattern(mask: torch.Tensor, granularity: Granularity) -> bool:
    if granularity.kind in UNSTRUCTURED:
        kernels = mask.flatten(2) if mask.ndim > 2 else mask[..., None]
        return bool((kernels == kernels[..., :1]).all())
    blocks = granularity.blocks(mask.shape) if mask.ndim > 1 else None
    if blocks is None or blocks.inputs * blocks.taps % blocks.size or granularity.misfit(mask.shape):
        return False
    counts = split_blocks(mask, blocks).sum(1, dtype=torch.int32)
    return bool((counts == (granularity.kept or counts[:1])).all())
