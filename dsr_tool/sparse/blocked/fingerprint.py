"""The modules of a network and their settings, on which a trace depends, quick to compare before each pass."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import nn

__all__ = ["HOOKS", "Fingerprint"]

_SIMPLE = (bool, int, float, str, type(None))
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Attributes of a module that hold its hooks."""


class Fingerprint:
    """The settings of a network, which decide what its forward does."""

    def __init__(self, root: nn.Module) -> None:
        """Finds the settings of all modules.

        Args:
            root: the network.
        """
        modules = list(root.modules())
        self._children = [(module._modules, tuple(module._modules.items())) for module in modules if module._modules]
        self._settings: list[tuple[dict[str, Any], str]] = [
            (module.__dict__, key)
            for module in modules
            for key, value in module.__dict__.items()
            if not key.startswith("_") and _is_simple(value)
        ]
        self._hooks = [getattr(module, name) for module in modules for name in HOOKS]

    def outdated(self) -> bool:
        """Returns whether a module was replaced, added or removed."""
        return any(tuple(held.items()) != before for held, before in self._children)

    def state(self) -> tuple[Hashable, ...]:
        """Returns the settings now: modes, numbers and texts of all modules, and how many hooks they have."""
        settings = tuple([held.get(key) for held, key in self._settings])
        return settings, (tuple(map(len, self._hooks)) if any(self._hooks) else ())


def _is_simple(value: object) -> bool:
    return isinstance(value, _SIMPLE) or (isinstance(value, tuple) and all(isinstance(each, _SIMPLE) for each in value))
