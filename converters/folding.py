"""Weights that torch computes from other parameters before each run: normalised, spectrally normalised, parametrised.

A mask over such a parameter is no mask over what the network computes with, so the computed weight takes its place.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook
from torch.nn.utils.weight_norm import WeightNorm

from converters.torch_prune import restore_order
from dsr_tool.errors import UsageError
from dsr_tool.sparse.discover import is_weight

__all__ = ["Folded", "fold_weights"]


class Folded(NamedTuple):
    """Computed weights that became parameters, by their names.

    Attributes:
        names: all of them.
        untied: those that were computed from parameters that other modules read too, in another way.
    """

    names: tuple[str, ...]
    untied: tuple[str, ...]


@torch.no_grad()
def fold_weights(module: nn.Module) -> Folded:
    """Replaces computed weights by parameters with the values that they have in eval mode, in place.

    Afterwards the network computes with the same values, and its weights have their usual names.

    Args:
        module: the network, not on the meta device.

    Weights that modules compute alike from shared parameters stay one parameter.

    Returns:
        Names of the weights, and of those that shared some parameters and are no longer tied.

    Raises:
        UsageError: a weight has other values each time that it is computed.
    """
    uses = Counter(id(one) for owner in module.modules() for one in owner._parameters.values() if one is not None)
    weights = [(path, owner, local) for path, owner in module.named_modules() for local in _computed(owner)]
    # Held until the end, so that no address is used again.
    sources = [_sources(owner, local) for _, owner, local in weights]
    made: dict[tuple[int, ...], nn.Parameter] = {}
    folded, shared_before = list[str](), list[str]()
    for (path, owner, local), parts in zip(weights, sources, strict=True):
        name, training = f"{path}.{local}" if path else local, owner.training
        shared = [(holder, key, part) for holder, key, part in parts if uses[id(part)] > 1]
        for holder, key, part in shared:
            # torch writes the result into one of them, which other modules read.
            holder._parameters[key] = nn.Parameter(part.clone(), part.requires_grad)
        owner.eval()  # spectral norms change their estimate in training mode
        _fold(owner, local, name)
        owner.train(training)
        if shared:
            mine = owner.get_parameter(local)
            first = made.setdefault(tuple(id(part) for *_, part in parts), mine)
            owner._parameters[local] = first if torch.equal(first, mine) else mine
        restore_order(owner, local)
        folded.append(name)
        shared_before += [name] * bool(shared)
    uses = Counter(id(one) for owner in module.modules() for one in owner._parameters.values() if one is not None)
    return Folded(tuple(folded), tuple(name for name in shared_before if uses[id(module.get_parameter(name))] == 1))


def _sources(owner: nn.Module, local: str) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Returns the parameters that a weight is computed from, each with the module that has it and its name there."""
    if parametrize.is_parametrized(owner, local):
        holders = list(owner.get_submodule(f"parametrizations.{local}").modules())
        return [(one, key, part) for one in holders for key, part in one._parameters.items() if part is not None]
    found = ((key, part) for key, part in owner._parameters.items() if key.startswith(f"{local}_"))
    return [(owner, key, part) for key, part in found if part is not None]


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
