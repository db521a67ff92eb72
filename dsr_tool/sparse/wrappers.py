"""Modules around a network that add nothing to what it computes: for several devices, compiled code, or averages."""

from __future__ import annotations

from torch import nn

from dsr_tool.errors import UsageError

__all__ = ["unwrapped"]

_INNER = {
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.optim.swa_utils.AveragedModel": "module",
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.ActivationWrapper": "_checkpoint_wrapped_module",
}
"""Attribute of the network in each class of wrappers. By name, since importing some of them takes seconds."""

_REFUSED = {
    "torch.jit._script.ScriptModule": "a TorchScript module, compiled code whose layers cannot be changed; give the "
    "network that it was scripted or traced from",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": "split between processes; give the "
    "network before it is wrapped",
}
"""Wrappers without a whole network in them, and what to give in their place."""


def unwrapped(module: nn.Module) -> nn.Module:
    """Returns a network without wrappers, and takes those out that lie around its submodules, in place.

    Names are then those of the network itself: `0.weight` for `module.0.weight` and `_orig_mod.0.weight`.

    Raises:
        UsageError: the network, or a submodule, is TorchScript or split between processes.
    """
    module = _innermost(module)
    for name, child in list(module._modules.items()):
        inner = None if child is None else unwrapped(child)
        if inner is not child:
            module._modules[name] = inner
    return module


def _innermost(module: nn.Module) -> nn.Module:
    """Returns what lies in any number of wrappers around one module."""
    while attribute := next((_INNER[name] for name in _class_names(module) if name in _INNER), None):
        module = module.get_submodule(attribute)
    for name, why in _REFUSED.items():
        if name in _class_names(module):
            raise UsageError(f"{getattr(module, 'original_name', type(module).__name__)} is {why}.")
    return module


def _class_names(module: nn.Module) -> list[str]:
    return [f"{base.__module__}.{base.__qualname__}" for base in type(module).__mro__]
