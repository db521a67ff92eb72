"""Averaged copies of a network, such as an exponential moving average, which stay inside masks that move."""

from __future__ import annotations

import torch
from torch import nn

from dsr_tool.errors import UsageError
from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparse.wrappers import unwrapped

__all__ = ["averaged"]


def averaged(model: SparseModel, copy: nn.Module) -> SparseModel:
    """Returns the sparse model of a copy, with masks of its own.

    Args:
        model: the sparse model that is trained.
        copy: a copy of its module, or a wrapper with the copy as `module`, as torch's `AveragedModel` is.

    Raises:
        UsageError: this is no copy of the network, or the network itself.
    """
    module = _unwrapped(model, copy)
    if module is model.module:
        raise UsageError("average() takes a copy of the network, and this is the network itself; pass its deepcopy.")
    masks = {name: mask.clone() for name, mask in model.masks.items()} if model.store is None else {}
    average = SparseModel(module, model.specs, masks, model.config)
    if average.store is None:
        average.apply_masks()
    else:
        _require_same_positions(model, average)
    return average


def _unwrapped(model: SparseModel, copy: nn.Module) -> nn.Module:
    """Returns the module with the network's own names."""
    wanted = {name: parameter.shape for name, parameter in model.module.named_parameters()}
    module: object = copy
    while isinstance(module, nn.Module):
        found = {name: parameter.shape for name, parameter in module.named_parameters()}
        if found == wanted:
            return module
        # First what is known to lie around networks, then what averages of other libraries call it.
        inner = unwrapped(module)
        module = inner if inner is not module else getattr(module, "module", None)
    raise UsageError(
        f"average() takes a copy of the network, and the parameters of this {type(copy).__name__} have other names or "
        f"shapes; pass copy.deepcopy(model.module), or torch.optim.swa_utils.AveragedModel(model.module)."
    )


def _require_same_positions(model: SparseModel, average: SparseModel) -> None:
    own, copied = model.store, average.store
    if own is None or copied is None or own.layers != copied.layers or own.values.device != copied.values.device:
        same = False
    else:
        same = torch.equal(own.positions, copied.positions)
    if not same:
        raise UsageError(
            "the copy has other active weights than the network, or is on another device; make it right before "
            "average(), by copy.deepcopy(model.module)."
        )
