"""A network as conversions and files see it: its own layers, with parameters that are what it computes with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from converters.folding import fold_weights
from converters.torch_prune import take_masks
from dsr_tool.errors import first_few
from dsr_tool.sparse.wrappers import unwrapped

__all__ = ["Plain", "make_plain"]


@dataclass(frozen=True)
class Plain:
    """A network without wrappers and without hooks that compute weights.

    Attributes:
        module: the network.
        masks: masks of `torch.nn.utils.prune` that it had, by parameter name; True where active.
        notes: sentences on what was folded.
    """

    module: nn.Module
    masks: Mapping[str, torch.Tensor]
    notes: tuple[str, ...]


def make_plain(module: nn.Module) -> Plain:
    """Takes wrappers off, and makes pruning and computed weights permanent, in place.

    Raises:
        UsageError: a module is TorchScript or split between processes, or a weight is random.
    """
    module = unwrapped(module)
    folded = fold_weights(module)
    told = (
        ("computed weights became plain parameters", folded.names),
        ("weights that were computed from shared parameters are now separate", folded.untied),
    )
    return Plain(module, take_masks(module), tuple(f"{what}: {first_few(names)}" for what, names in told if names))
