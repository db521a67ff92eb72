"""LayerParameters: the values of each layer as a parameter of its own, for optimizers with settings by layer.

The flat parameter stays the only one that autograd and DistributedDataParallel know. A layer's parameter is a view of
its slice: an optimizer steps it in place, its gradient is the same slice of the flat gradient, and it keeps its
identity when a method changes its length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from dsr_tool.errors import UsageError

if TYPE_CHECKING:
    from dsr_tool.sparse.compact.store import CompactStore

__all__ = ["LayerParameters"]


class LayerParameters(Mapping[str, nn.Parameter]):
    """A parameter of shape (active,) for each layer of a store, by name; frozen layers too."""

    def __init__(self, store: CompactStore) -> None:
        """Makes the parameters, and hooks on to the flat one.

        Args:
            store: the layers.
        """
        self._store = store
        trained = set(store.trained) if store.values.requires_grad else set()
        # They share the version counter of the flat parameter, so autograd sees when a step comes too early.
        self._parameters = {
            name: nn.Parameter(store.values_of(name).detach(), requires_grad=name in trained) for name in store.layers
        }
        self._trained: dict[str, nn.Parameter] = {}  # those that had a gradient at some time
        self._flags = {name: parameter.requires_grad for name, parameter in self._parameters.items()}
        self._flat_gradient: torch.Tensor | None = None
        self._hooked: nn.Parameter | None = None
        self.follow()

    def __getitem__(self, name: str) -> nn.Parameter:
        return self._parameters[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    def follow_flags(self) -> None:
        """Has the parameters say which layers are trained now, before somebody changes that; see `changed`."""
        for name, parameter in self._parameters.items():
            trained = self._store.layers[name].trained and self._store.values.requires_grad
            if parameter.requires_grad == self._flags[name] != trained:
                parameter.requires_grad_(trained)
                self._flags[name] = trained
        if self._hook():
            self._share()

    def changed(self) -> str | None:
        """Returns the name of a layer that somebody froze or unfroze by its parameter; None if nobody did."""
        flags = ((name, parameter.requires_grad) for name, parameter in self._parameters.items())
        return next((name for name, flag in flags if flag != self._flags[name]), None)

    @torch.no_grad()
    def follow(self) -> None:
        """Points each parameter at its slice again, after layers changed their length or the flat parameter moved."""
        for name, parameter in self._parameters.items():
            parameter.grad = None
            parameter.data = self._store.values_of(name).detach()
        self._hook()
        self._share()

    def _hook(self) -> bool:
        """Hooks on to the flat parameter and to new trained layers, which torch refuses while they are frozen."""
        others = {name: self._parameters[name] for name in self._store.trained if name not in self._trained}
        new = {name: parameter for name, parameter in others.items() if parameter.requires_grad}
        for name, parameter in new.items():
            parameter.register_hook(_refusal(name))
        self._trained |= new
        values = self._store.values
        if values is not self._hooked and values.requires_grad and self._trained:
            values.register_hook(lambda _: self.drop_cleared())
            values.register_post_accumulate_grad_hook(lambda _: self._share_later())
            self._hooked = values
        return bool(new)

    @torch.no_grad()
    def drop_cleared(self) -> None:
        """Clears the flat gradient wherever that of a layer was cleared: `zero_grad()` of an optimizer sees layers."""
        flat = self._store.values.grad
        if flat is None or self._flat_gradient is None:
            return
        cleared = [name for name, parameter in self._trained.items() if parameter.grad is None]
        if len(cleared) == len(self._trained):
            self._store.values.grad = self._flat_gradient = None
            return
        for name in cleared:
            self._slice(flat, name).zero_()

    def _share_later(self) -> None:
        # DistributedDataParallel may put a slice of a message in place of the gradient after this hook.
        torch.autograd.Variable._execution_engine.queue_callback(self._share)

    @torch.no_grad()
    def _share(self) -> None:
        """Gives each layer its slice of the flat gradient."""
        self._flat_gradient = flat = self._store.values.grad
        for name, parameter in self._trained.items():
            # One that was frozen meanwhile is not stepped.
            parameter.grad = self._slice(flat, name) if flat is not None and parameter.requires_grad else None

    def _slice(self, flat: torch.Tensor, name: str) -> torch.Tensor:
        layer = self._store.layers[name]
        return flat.narrow(0, layer.start, layer.count)


def _refusal(name: str) -> Callable[[torch.Tensor], None]:
    def refuse(_: torch.Tensor) -> None:
        raise UsageError(
            f"a loss reads the parameter {name!r} of compact storage itself, which has no part in the network; take "
            f"the weight from its module instead."
        )

    return refuse
