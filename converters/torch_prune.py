"""Masks of `torch.nn.utils.prune`, in checkpoints and in modules: `weight_orig` and `weight_mask` beside a hook.

A mask is taken as it is, so that an active weight of zero stays active, which the zeros alone could not tell.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.utils import prune

from dsr_tool.errors import UsageError
from dsr_tool.sparse.aliases import completed, later_names

__all__ = ["prune_module", "restore_order", "split_masks", "take_masks"]

_VALUES, _MASK = "_orig", "_mask"
"""Endings that torch adds to the name of a pruned parameter, for its values and for its mask."""


def split_masks(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Splits a state_dict into one with pruned values under their usual names, and their masks.

    Args:
        state: entries by name, with or without pairs of `..._orig` and `..._mask`.

    Returns:
        The entries, where a pair became one entry that is zero outside its mask; and a boolean mask for each pair, True
        where active, by the name of the entry.
    """
    values, masks = dict(state), {}
    for key in state:
        name = key.removesuffix(_VALUES)
        mask = state.get(name + _MASK)
        if name == key or name in state or mask is None or mask.shape != state[key].shape:
            continue
        masks[name] = mask != 0
        # Not a product alone: it would keep NaN outside the mask.
        values[name] = (values.pop(key) * values.pop(name + _MASK)).masked_fill(~masks[name], 0)
    return values, masks


def prune_module(module: nn.Module, masks: Mapping[str, torch.Tensor]) -> None:
    """Prunes a module as torch does, so that it carries its masks until `take_masks`.

    Args:
        module: the network, changed in place; not on the meta device.
        masks: boolean masks by parameter name; those that fit no parameter are left out, as for a head that was
            replaced.
    """
    parameters = dict(module.named_parameters())
    later = later_names(module)
    parameters |= {name: parameters[first] for name, first in later.items() if first in parameters}
    for name, mask in completed(masks, later).items():
        path, _, local = name.rpartition(".")
        if name in parameters and parameters[name].shape == mask.shape:
            prune.custom_from_mask(module.get_submodule(path), local, mask)


@torch.no_grad()
def take_masks(module: nn.Module) -> dict[str, torch.Tensor]:
    """Makes all pruning of torch permanent in a module, in place, and returns its masks.

    Afterwards parameters have their usual names again, with zeros outside the masks, and no hooks are left.

    Returns:
        A boolean mask for each pruned parameter by its name, True where active; empty for a module without pruning.

    Raises:
        UsageError: modules share a parameter, and do not prune it in the same way.
    """
    _require_one_mask(module)
    masks = {}
    for path, owner in module.named_modules():
        hooks = [hook for hook in owner._forward_pre_hooks.values() if isinstance(hook, prune.BasePruningMethod)]
        for local in [str(hook._tensor_name) for hook in hooks]:
            mask: torch.Tensor = getattr(owner, local + _MASK) != 0
            prune.remove(owner, local)
            owner._parameters[local].masked_fill_(~mask, 0)
            masks[f"{path}.{local}" if path else local] = mask
            restore_order(owner, local)
    return masks


def _require_one_mask(module: nn.Module) -> None:
    """Raises `UsageError` if modules compute with different weights although they share the parameter of these."""
    found: dict[int, tuple[str, torch.Tensor | None]] = {}
    for path, owner in module.named_modules():
        for local, parameter in owner._parameters.items():
            if parameter is None:
                continue
            mask = owner._buffers.get(local.removesuffix(_VALUES) + _MASK) if local.endswith(_VALUES) else None
            name = f"{path}.{local.removesuffix(_VALUES) if mask is not None else local}".removeprefix(".")
            other, known = found.setdefault(id(parameter), (name, mask))
            if (mask is None) != (known is None) or (
                mask is not None and known is not None and not torch.equal(mask != 0, known != 0)
            ):
                raise UsageError(
                    f"{other!r} and {name!r} share one parameter, and torch.nn.utils.prune masks it differently in the "
                    f"two; prune both with one mask, or give each module a parameter of its own."
                )


def restore_order(owner: nn.Module, local: str) -> None:
    """Puts a weight that torch registered again before the other parameters of its module.

    torch appends it, but everything here goes in the order that the layer was made with, in which biases are last.
    """
    if "bias" not in local:
        others = {name: owner._parameters.pop(name) for name in list(owner._parameters) if name != local}
        owner._parameters.update(others)
