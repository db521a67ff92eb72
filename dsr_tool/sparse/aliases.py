"""One tensor under several names: it counts once, under the first name, as PyTorch's parameters do.

A submodule may have several names, and several modules may share a parameter (tied weights). A `state_dict` has every
name, so files for plain PyTorch code get all of them back.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import nn

from dsr_tool.sparse.compact.marks import store_of

__all__ = ["aliased_entries", "assign", "completed", "later_names"]

T = TypeVar("T")


def later_names(module: nn.Module) -> dict[str, str]:
    """Returns the first name of every entry of the state_dict by each of its later ones; empty for most networks.

    In compact storage, modules that read one layer have one weight.
    """
    paths = _later_paths(module)
    with _naming(module):
        state = module.state_dict(keep_vars=True)  # without keep_vars, tied weights are different tensors
    # Entries beside these are made anew with each state_dict, so only the module tells which of them are one.
    held = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    first: dict[int | str, str] = {}
    later: dict[str, str] = {}
    for name, entry in state.items():
        path, _, local = name.rpartition(".")
        earliest = f"{paths[path]}.{local}".removeprefix(".") if path in paths else name
        if isinstance(entry, str):
            earliest = first.setdefault(entry, earliest)
        elif id(entry) in held:
            earliest = first.setdefault(id(entry), earliest)
        if earliest != name:
            later[name] = earliest
    return later


def aliased_entries(state: Mapping[str, T], later: Mapping[str, str]) -> dict[str, T]:
    """Returns entries under their other names.

    Args:
        state: entries under their first names.
        later: the result of `later_names`.
    """
    return {name: state[earlier] for name, earlier in later.items() if earlier in state}


def completed(state: Mapping[str, T], later: Mapping[str, str]) -> dict[str, T]:
    """Returns the entries of a module under all their names, whichever of them a state has.

    Args:
        state: entries by name; tools that write shared tensors once may have kept any of their names.
        later: the result of `later_names` for the module that they are for.
    """
    first = {later.get(name, name): entry for name, entry in state.items()}
    first |= {name: entry for name, entry in state.items() if name not in later}
    return {**first, **aliased_entries(first, later), **state}


def assign(module: nn.Module, state: Mapping[str, torch.Tensor], *, strict: bool = True) -> None:
    """Gives a module the tensors of a state_dict themselves; what was one tensor stays one.

    Args:
        module: the network, changed in place; it may be on the meta device.
        state: the tensors by name; of those with several names, any may be there.
        strict: whether all entries must be there, and no others.
    """
    later = later_names(module)
    # torch keeps the versions of the layers beside the tensors, and some models (MNASNet) read theirs when they load.
    versioned = OrderedDict(completed(state, later))
    with _naming(module):  # of a compact network, a state_dict without dense weights
        versioned._metadata = module.state_dict()._metadata  # type: ignore[attr-defined]
    module.load_state_dict(versioned, strict=strict, assign=True)
    modules = dict(module.named_modules(remove_duplicate=False))
    # Each name got a parameter of its own for the tensor that was assigned.
    for name, earlier in later.items():
        (path, _, local), (first, _, attribute) = name.rpartition("."), earlier.rpartition(".")
        for mine, theirs in (
            (modules[path]._parameters, modules[first]._parameters),
            (modules[path]._buffers, modules[first]._buffers),
        ):
            if local in mine and attribute in theirs:
                mine[local] = theirs[attribute]


def _naming(module: nn.Module) -> AbstractContextManager[None]:
    store = store_of(module)
    return nullcontext() if store is None else store.naming()


def _later_paths(module: nn.Module) -> dict[str, str]:
    """Returns the first path of every submodule by each of its later ones; empty for most networks."""
    first: dict[int, str] = {}
    paths = {path: first.setdefault(id(one), path) for path, one in module.named_modules(remove_duplicate=False)}
    return {path: earlier for path, earlier in paths.items() if path != earlier}
