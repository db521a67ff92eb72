"""Between the storages: a masked module becomes compact, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from dsr_tool.sparse.aliases import later_names
from dsr_tool.sparse.compact.marks import VALUES, store_of
from dsr_tool.sparse.compact.modules import install
from dsr_tool.sparse.compact.parts import each_layer
from dsr_tool.sparse.compact.store import CompactStore, Entry

__all__ = ["compacted", "held_state", "named_parameters", "parameters_of"]


@torch.no_grad()
def compacted(module: nn.Module, masks: Mapping[str, torch.Tensor]) -> CompactStore:
    """Puts a module into compact storage in place.

    Args:
        module: a network whose inactive weights are zero.
        masks: boolean tensor of each sparse weight by name, True where active.

    Raises:
        UsageError: compact storage cannot hold this module.
    """
    parameters = dict(module.named_parameters())
    entries = []
    for name, mask in masks.items():
        weight, positions = parameters[name], mask.reshape(-1).nonzero().squeeze(1)
        entries.append(Entry.of(name, weight, positions, trained=weight.requires_grad))
    store = CompactStore(entries)
    install(module, store)
    return store


def parameters_of(module: nn.Module) -> int:
    """Returns the number of parameters of a network, those that are inactive included."""
    store = store_of(module)
    if store is None:
        return sum(parameter.numel() for parameter in module.parameters())
    dense = sum(parameter.numel() for name, parameter in module.named_parameters() if name != VALUES)
    return dense + sum(layer.size for layer in store.layers.values())


def named_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields the parameters by their names in the `state_dict`, in its order; in compact storage one for each layer."""
    store = store_of(module)
    yield from module.named_parameters() if store is None else each_layer(module, store)


def held_state(module: nn.Module) -> list[tuple[str, torch.Tensor, Callable[[], torch.Tensor]]]:
    """Lists a state_dict in its order: name, a tensor of its type and shape, and what makes the tensor itself.

    Of a tensor with several names, the first is listed. Of a compact network the first tensor has no
    data, and dense weights exist one at a time.
    """
    store = store_of(module)
    if store is None:
        return [(name, *_itself(tensor)) for name, tensor in _first_named(module).items()]
    with store.naming():
        state = _first_named(module)
    return [(name, *_held(store, held)) for name, held in state.items()]


def _first_named(module: nn.Module) -> dict[str, Any]:
    later = later_names(module)
    return {name: entry for name, entry in module.state_dict().items() if name not in later}


def _itself(tensor: torch.Tensor) -> tuple[torch.Tensor, Callable[[], torch.Tensor]]:
    return tensor, lambda: tensor


def _held(store: CompactStore, held: Any) -> tuple[torch.Tensor, Callable[[], torch.Tensor]]:
    if not isinstance(held, str) or held not in store.layers:
        return _itself(held)
    shape = store.layers[held].shape
    return torch.empty(shape, dtype=store.values.dtype, device="meta"), lambda: store.dense(held).detach()
