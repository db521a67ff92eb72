"""One submodule under several names: its entries count once, under the first name, as PyTorch's parameters do.

A `state_dict` has every name, so files for plain PyTorch code get all of them back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import nn

__all__ = ["aliased_entries", "completed", "first_name", "is_alias", "later_paths"]

T = TypeVar("T")


def later_paths(module: nn.Module) -> dict[str, str]:
    """Returns the first path of every submodule by each of its later ones; empty for most networks."""
    first: dict[int, str] = {}
    paths = {path: first.setdefault(id(one), path) for path, one in module.named_modules(remove_duplicate=False)}
    return {path: earlier for path, earlier in paths.items() if path != earlier}


def is_alias(name: str, later: Mapping[str, str]) -> bool:
    """Returns whether an entry of a state_dict has an earlier name.

    Args:
        name: name of the entry.
        later: the result of `later_paths`.
    """
    return name.rpartition(".")[0] in later


def first_name(name: str, later: Mapping[str, str]) -> str:
    """Returns the first name of an entry of a state_dict; see `is_alias`."""
    path, _, local = name.rpartition(".")
    return f"{later[path]}.{local}".removeprefix(".") if path in later else name


def aliased_entries(state: Mapping[str, T], later: Mapping[str, str]) -> dict[str, T]:
    """Returns entries under their other names.

    Args:
        state: entries under their first names.
        later: the result of `later_paths`.
    """
    found = {}
    for path, earlier in later.items():
        for name, entry in state.items():
            owner, _, local = name.rpartition(".")
            if owner == earlier:
                found[f"{path}.{local}"] = entry
    return found


def completed(state: Mapping[str, T], module: nn.Module) -> dict[str, T]:
    """Returns the entries of a module under all their names, whichever of them a state has.

    Args:
        state: entries by name; tools that write shared tensors once may have kept any of their names.
        module: the module that they are for.
    """
    later = later_paths(module)
    if not later:
        return dict(state)
    first = {first_name(name, later): entry for name, entry in state.items()}
    first |= {name: entry for name, entry in state.items() if not is_alias(name, later)}
    return {**first, **aliased_entries(first, later), **state}
