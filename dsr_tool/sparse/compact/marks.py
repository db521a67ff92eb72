"""What a module in compact storage carries, and what can be asked of it."""

from __future__ import annotations

import torch
from torch import nn

from dsr_tool.sparse.compact.store import CompactStore

__all__ = ["LAYERS", "ORDER", "RUNNER", "STORE", "VALUES", "held_values", "plain_class", "store_of"]

VALUES = "sparse_values"
"""Name of the flat parameter in the root module."""

STORE, LAYERS, ORDER, RUNNER = "_compact_store", "_compact_layers", "_compact_order", "_compact_runner"
"""Attributes of a module in compact storage: the store; names of layers by attribute; its parameters in their order;
what runs it on kernels."""


def store_of(module: nn.Module) -> CompactStore | None:
    """Returns the store of a module in compact storage, or None."""
    return module.__dict__.get(STORE)


def held_values(module: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the active values of a module's own sparse weights by attribute; none in masked storage."""
    store, held = store_of(module), module.__dict__.get(LAYERS, {})
    return {} if store is None else {attribute: store.values_of(name) for attribute, name in held.items()}


def plain_class(module: nn.Module) -> type[nn.Module]:
    """Returns the class that a module had before compact storage."""
    return getattr(type(module), "compact_base", type(module))
