"""Modules in compact storage: the user's own, of a class that differs in where sparse weights come from.

A layer keeps its class, as `isinstance` sees it, and its attribute `weight`, which is now built on access. Names,
order and bytes of the `state_dict` stay what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from dsr_tool.errors import UsageError
from dsr_tool.sparse.blocked.runner import Runner
from dsr_tool.sparse.compact.marks import LAYERS, ORDER, RUNNER, STORE, VALUES, plain_class, store_of
from dsr_tool.sparse.compact.parts import hide_layers, show_layers
from dsr_tool.sparse.compact.rebuild import light
from dsr_tool.sparse.compact.store import CompactStore, frozen_before, trained_before

__all__ = ["install", "runner_of", "uninstall"]


_Module = TypeVar("_Module", bound=nn.Module)


def install(module: nn.Module, store: CompactStore) -> None:
    """Puts a module into compact storage in place: sparse parameters go, and the flat one comes.

    Args:
        module: the root module, with a parameter for each layer of the store.
        store: the store, which has the values already.

    Raises:
        UsageError: the root has a parameter of this name, or a module's class cannot be extended.
    """
    if hasattr(module, VALUES):
        raise UsageError(f"the network has a {VALUES!r} of its own; give --storage masked.")
    layers: dict[nn.Module, dict[str, str]] = {}
    names = {id(parameter): name for name, parameter in module.named_parameters() if name in store.layers}
    for owner in module.modules():
        # A parameter that two modules share has one name, and both read the same layer.
        held = {key: names[id(p)] for key, p in owner._parameters.items() if p is not None and id(p) in names}
        if held:
            layers[owner] = held
    layers.setdefault(module, {})
    for owner, held in layers.items():
        owner.__dict__[ORDER] = list(owner._parameters)
        for attribute in held:
            del owner._parameters[attribute]
        owner.__dict__[STORE], owner.__dict__[LAYERS] = store, held
        _change_class(owner, _compact_class(type(owner), tuple(held), root=owner is module))
    module.register_parameter(VALUES, store.values)
    show_layers(module, store)


def uninstall(module: nn.Module) -> None:
    """Puts a module back into masked storage in place, with dense parameters that have exact zeros."""
    store = store_of(module)
    if store is None:
        return
    made: dict[str, nn.Parameter] = {}
    hide_layers(module)
    del module._parameters[VALUES]
    for owner in module.modules():
        held: Mapping[str, str] | None = owner.__dict__.pop(LAYERS, None)
        if held is None:
            continue
        order = owner.__dict__.pop(ORDER)
        del owner.__dict__[STORE]
        owner.__dict__.pop(RUNNER, None)
        _change_class(owner, plain_class(owner))
        for attribute, name in held.items():
            if name not in made:
                layer = store.layers[name]
                trained = layer.trained and store.values.requires_grad
                made[name] = nn.Parameter(store.dense(name).detach(), requires_grad=trained)
            owner._parameters[attribute] = made[name]
        owner._parameters = {key: owner._parameters[key] for key in order}


def runner_of(module: nn.Module) -> Runner | None:
    """Returns what runs the root of a compact network on kernels; None in masked storage."""
    store = store_of(module)
    if store is None:
        return None
    if RUNNER not in module.__dict__:
        module.__dict__[RUNNER] = Runner(module, store)
    runner: Runner = module.__dict__[RUNNER]
    return runner


def _change_class(module: nn.Module, target: type[nn.Module]) -> None:
    try:
        module.__class__ = target
    except TypeError as error:
        raise UsageError(
            f"{type(module).__name__} cannot be put into compact storage ({error}); give --storage masked."
        ) from error


class _Layer(nn.Module):
    """What a module in compact storage does differently; mixed into its own class."""

    compact_base: type[nn.Module] = nn.Module
    compact_attributes: tuple[str, ...] = ()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        own: dict[str, Any] = {}
        super()._save_to_state_dict(own, prefix, keep_vars)
        own.pop(prefix + VALUES, None)
        store, held = self.__dict__[STORE], self.__dict__[LAYERS]
        with torch.no_grad():
            own |= {prefix + attribute: store.for_state(name) for attribute, name in held.items()}
        # Parameters in their old order, then buffers.
        keys = [prefix + key for key in self.__dict__[ORDER]]
        destination.update({key: own.pop(key) for key in keys if key in own})
        destination.update(own)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        store, held = self.__dict__[STORE], self.__dict__[LAYERS]
        mine = {prefix + attribute: name for attribute, name in held.items()}
        others = {key: value for key, value in state_dict.items() if key not in mine}
        super()._load_from_state_dict(others, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if prefix + VALUES in missing_keys:
            missing_keys.remove(prefix + VALUES)
        for key, name in mine.items():
            if key not in state_dict:
                missing_keys.append(key)
            elif problem := _load(store, name, state_dict[key]):
                error_msgs.append(problem)

    def requires_grad_(self: _Module, requires_grad: bool = True) -> _Module:
        """Refuses what torch would do to other parameters only: sparse weights are in the one vector of the root.

        Raises:
            UsageError: a sparse layer in here would stay frozen, or trained.
        """
        store: CompactStore = self.__dict__[STORE]
        whole = VALUES in self._parameters
        names = (name for module in self.modules() for name in module.__dict__.get(LAYERS, {}).values())
        for layer in (store.layers[name] for name in names):
            if requires_grad and not (layer.trained and (whole or store.values.requires_grad)):
                raise frozen_before(layer.name)
            if not requires_grad and not whole and layer.trained and store.values.requires_grad:
                raise trained_before(layer.name)
        return nn.Module.requires_grad_(self, requires_grad)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Names the class by its base, because a class that was made here cannot be found by its name."""
        return _new, (self.compact_base, self.compact_attributes, VALUES in self._parameters), dict(self.__dict__)


class _Root(_Layer):
    """The root of a network in compact storage."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        store: CompactStore = self.__dict__[STORE]
        store.require_flags()
        runner = runner_of(self)
        if runner is not None and runner.accepts(args, kwargs):
            return runner(*args, **kwargs)
        with store.forward(), light():
            return super().forward(*args, **kwargs)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Yields the flat parameter, all dense ones, and those of frozen sparse layers, so that loops see them."""
        yield from super().parameters(recurse)
        store: CompactStore = self.__dict__[STORE]
        frozen = [name for name, layer in store.layers.items() if not layer.trained] if recurse else []
        if frozen:
            layers = store.parameters()
            yield from (layers[name] for name in frozen)

    def _apply(self, fn: Callable[..., torch.Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        values = self._parameters[VALUES]
        if values is not None:
            self.__dict__[STORE].moved(values)
        return self


def _load(store: CompactStore, name: str, weight: torch.Tensor) -> str:
    """Loads a dense weight into a layer. Returns what is wrong with it, or an empty text."""
    shape = store.layers[name].shape
    if tuple(weight.shape) != shape:
        return f"size mismatch for {name}: the shape is {tuple(weight.shape)} in the state_dict, {shape} in the model."
    outside = store.write(name, weight.to(store.values.device))
    if outside:
        return (
            f"{name} has {outside:,} non-zero values outside of its mask, which compact storage cannot hold; if a "
            f"method had moved the mask, call load_state_dict() of what attach returned first."
        )
    return ""


_CLASSES: dict[tuple[type[nn.Module], tuple[str, ...], bool], type[nn.Module]] = {}
"""The classes that were made, so that modules of one class stay of one class."""


def _compact_class(base: type[nn.Module], attributes: tuple[str, ...], *, root: bool) -> type[nn.Module]:
    """Returns a subclass of a module's class whose sparse weights are built on access."""
    key = base, attributes, root
    if key not in _CLASSES:
        _CLASSES[key] = _make_class(base, attributes, root=root)
    return _CLASSES[key]


def _make_class(base: type[nn.Module], attributes: tuple[str, ...], *, root: bool) -> type[nn.Module]:
    own: dict[str, Any] = {attribute: _weight(attribute) for attribute in attributes}
    own |= {"compact_base": base, "compact_attributes": attributes, "__doc__": base.__doc__}
    own["__module__"] = base.__module__
    return type(base.__name__, ((_Root if root else _Layer), base), own)


def _weight(attribute: str) -> property:
    def read(self: nn.Module) -> torch.Tensor:
        store: CompactStore = self.__dict__[STORE]
        weight: torch.Tensor = store.read(self.__dict__[LAYERS][attribute])
        return weight

    return property(read)


def _new(base: type[nn.Module], attributes: Iterable[str], root: bool) -> nn.Module:
    """Returns an empty module of a class in compact storage, for copies and pickles."""
    made = _compact_class(base, tuple(attributes), root=root)
    return made.__new__(made)
