"""Modules whose weights are spread over several processes, which no mask fits."""

from __future__ import annotations

import sys

from torch import nn

from dsr_tool.errors import UsageError

__all__ = ["refuse_sharded"]


def refuse_sharded(module: nn.Module) -> None:
    """Raises `UsageError` for a module that FSDP or tensor parallelism has sharded.

    A rank then holds a part of each weight, flat or cut by rows, while masks, budgets and thresholds are about whole
    weights.
    """
    kind = _sharded_by(module)
    if kind is not None:
        raise UsageError(
            f"the model is sharded by {kind}, so that this process holds only parts of its weights, and masks belong "
            f"to whole ones; wrap the module in torch's DistributedDataParallel instead."
        )


def _sharded_by(module: nn.Module) -> str | None:
    """Returns what sharded a module, or None."""
    # Whoever shards has imported these; to import them here would take a second.
    fsdp, tensor = sys.modules.get("torch.distributed.fsdp"), sys.modules.get("torch.distributed.tensor")
    for part in module.modules():
        # The wrapper may be outside of the module that is looked at; it leaves this mark on all modules inside.
        if fsdp is not None and (
            isinstance(part, (fsdp.FullyShardedDataParallel, fsdp.FSDPModule))
            or getattr(part, "_is_fsdp_managed_module", False)
        ):
            return "FSDP"
    if tensor is not None and any(isinstance(parameter, tensor.DTensor) for parameter in module.parameters()):
        return "tensor parallelism"
    return None
