"""Weights that torch computes from other parameters before each run: normalised, spectrally normalised, parametrised.

A mask over such a parameter is no mask over what the network computes with, so the computed weight takes its place.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook
from torch.nn.utils.weight_norm import WeightNorm

from converters.torch_prune import restore_order
from dsr_tool.errors import UsageError
from dsr_tool.sparse.discover import is_weight

__all__ = ["fold_weights"]


@torch.no_grad()
def fold_weights(module: nn.Module) -> list[str]:
    """Replaces computed weights by parameters with the values that they have in eval mode, in place.

    Afterwards the network computes with the same values, and its weights have their usual names.

    Args:
        module: the network, not on the meta device.

    Returns:
        Names of the weights.

    Raises:
        UsageError: a weight has other values each time that it is computed.
    """
    folded = []
    for path, owner in list(module.named_modules()):
        for local in _computed(owner):
            name, training = f"{path}.{local}" if path else local, owner.training
            owner.eval()  # spectral norms change their estimate in training mode
            _fold(owner, local, name)
            owner.train(training)
            restore_order(owner, local)
            folded.append(name)
    return folded


def _computed(owner: nn.Module) -> list[str]:
    """Returns the weights of one module that are computed."""
    hooks = (hook for hook in owner._forward_pre_hooks.values() if isinstance(hook, (WeightNorm, SpectralNorm)))
    parametrized = list(owner.get_submodule("parametrizations")._modules) if parametrize.is_parametrized(owner) else []
    return [local for local in (*parametrized, *(hook.name for hook in hooks)) if is_weight(owner, local)]


def _fold(owner: nn.Module, local: str, name: str) -> None:
    trained = any(parameter.requires_grad for key, parameter in owner.named_parameters() if local in key)
    if parametrize.is_parametrized(owner, local):
        value = getattr(owner, local).clone()
        if not torch.equal(value, getattr(owner, local)):
            raise UsageError(
                f"weight {name!r} has other values each time that it is computed; remove what makes it random first "
                f"(torch.nn.utils.parametrize.remove_parametrizations)."
            )
        parametrize.remove_parametrizations(owner, local)
    elif any(isinstance(hook, WeightNorm) and hook.name == local for hook in owner._forward_pre_hooks.values()):
        value = remove_weight_norm(owner, local).get_parameter(local)
    else:
        value = remove_spectral_norm(owner, local).get_parameter(local)
        _forget_old_entries(owner, local)
    # A weight that was computed from several parameters is a plain tensor now.
    owner._buffers.pop(local, None)
    if local not in owner._parameters:
        owner.register_parameter(local, nn.Parameter(value))
    parameter = owner.get_parameter(local).requires_grad_(trained)
    # Row-major as files are, so that a loaded network rounds in the same way; a factorisation may leave it transposed.
    parameter.data = parameter.data.contiguous()


def _forget_old_entries(owner: nn.Module, local: str) -> None:
    """Removes a hook that `remove_spectral_norm` leaves behind, and that would look for the old entries in files."""
    hooks = owner._load_state_dict_pre_hooks
    for key, hook in list(hooks.items()):
        inner = getattr(hook, "hook", hook)
        if isinstance(inner, SpectralNormLoadStateDictPreHook) and inner.fn.name == local:
            del hooks[key]
