"""Parts of a network in compact storage: each of them lists the sparse weights in it, as it does in masked storage.

The root has all of them in one parameter. A loop over the parameters of a part, which freezes it or gives it settings
of its own, would otherwise pass its sparse weights by.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from dsr_tool.sparse.compact.marks import LAYERS, ORDER
from dsr_tool.sparse.compact.store import CompactStore

__all__ = ["each_layer", "hide_layers", "show_layers"]

_LISTS = "named_parameters"
"""Name of the method that lists a module's parameters; `parameters()` calls it."""


class _Lists:
    """Takes the place of `named_parameters` in a part of a network; copies and pickles follow the part."""

    def __init__(self, part: nn.Module, store: CompactStore) -> None:
        """Takes the part, which is not the root, and the store of its network."""
        self._part, self._store = part, store

    def __call__(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields what torch's method does, and with `recurse` the parameter of each sparse layer."""
        if not recurse:
            # DistributedDataParallel goes through the modules one by one, and must see no more than the flat parameter.
            yield from nn.Module.named_parameters(self._part, prefix, recurse, remove_duplicate)
            return
        before = f"{prefix}." if prefix else ""
        for name, parameter in each_layer(self._part, self._store, once=remove_duplicate):
            yield before + name, parameter


def show_layers(module: nn.Module, store: CompactStore) -> None:
    """Has the parts of a network list their sparse layers.

    Args:
        module: the root, in compact storage.
        store: its store.
    """
    for path, part in module.named_modules():
        if path and any(one.__dict__.get(LAYERS) for one in part.modules()):
            part.__dict__[_LISTS] = _Lists(part, store)


def hide_layers(module: nn.Module) -> None:
    """Undoes `show_layers`."""
    for part in module.modules():
        if isinstance(part.__dict__.get(_LISTS), _Lists):
            del part.__dict__[_LISTS]


def each_layer(module: nn.Module, store: CompactStore, *, once: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields the parameters of a compact network or of a part of it by name, one for each sparse layer.

    Args:
        module: the root or a part.
        store: the store of the network.
        once: whether a parameter with several names is listed under the first alone.
    """
    layers, seen = store.parameters(), {id(store.values)}
    for path, owner in module.named_modules(remove_duplicate=once):
        held = owner.__dict__.get(LAYERS, {})
        for attribute in dict.fromkeys([*owner.__dict__.get(ORDER, ()), *owner._parameters]):
            parameter = layers[held[attribute]] if attribute in held else owner._parameters[attribute]
            if parameter is store.values or parameter is None or (once and id(parameter) in seen):
                continue
            seen.add(id(parameter))
            yield f"{path}.{attribute}" if path else attribute, parameter
