"""Which keeper keeps the masks of which weight: one, and no optimizer without it steps that weight."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any, Protocol
from weakref import ReferenceType, ref

import torch
from torch import optim
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from dsr_tool.errors import UsageError

__all__ = ["claim", "owned", "release"]


class Owner(Protocol):
    """What this module asks of a keeper."""

    def steps_with(self, optimizer: optim.Optimizer) -> bool:
        """Returns whether its masks are kept in the steps of an optimizer."""

    def name_of(self, weight: torch.Tensor) -> str:
        """Returns the name of one of its weights."""


_OWNERS: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""A weak reference to the keeper of each weight. An optimizer's hooks hold its keeper, so both die together."""

_watching = False


def claim(owner: Owner, weights: Iterable[torch.Tensor], optimizer: optim.Optimizer) -> None:
    """Makes a keeper the only one of some weights.

    Raises:
        UsageError: one of them has another keeper, which is still in use; then nothing was claimed.
    """
    global _watching  # noqa: PLW0603 - one hook for the process
    weights = list(weights)
    for weight in weights:
        if owned(weight) is owner or (other := _in_use(weight)) is None:
            continue
        if other.steps_with(optimizer):
            raise UsageError("a method is attached to this optimizer already; call remove() on what attach returned.")
        raise UsageError(
            f"weight {other.name_of(weight)!r} is in two optimizers, and a method is attached to the other one; give "
            f"each weight to one optimizer, or call remove() on what the first attach returned."
        )
    for weight in weights:
        _OWNERS[weight] = ref(owner)
    if not _watching:
        register_optimizer_step_pre_hook(_refuse_strangers)
        _watching = True


def release(owner: Owner, weights: Iterable[torch.Tensor]) -> None:
    """Gives weights of a keeper free."""
    for weight in weights:
        if owned(weight) is owner:
            del _OWNERS[weight]


def owned(weight: torch.Tensor) -> Owner | None:
    """Returns the keeper of a weight, or None."""
    reference: ReferenceType[Owner] | None = _OWNERS.get(weight)
    return None if reference is None else reference()


def _is_stranger(parameter: torch.Tensor, optimizer: optim.Optimizer) -> bool:
    """Returns whether a parameter has a keeper that does not step with an optimizer."""
    owner = owned(parameter)
    return owner is not None and not owner.steps_with(optimizer)


def _in_use(weight: torch.Tensor) -> Owner | None:
    """Returns the keeper of a weight, unless nobody holds its optimizer any more."""
    if owned(weight) is not None:
        # An optimizer and its keeper refer to each other, so they stay until they are collected.
        gc.collect()
    return owned(weight)


def _refuse_strangers(optimizer: optim.Optimizer, *_: Any) -> None:
    """Refuses the step of an optimizer that would fill a weight outside its mask, before it does."""
    if not _OWNERS:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is None or not _is_stranger(parameter, optimizer):
                continue
            if (owner := _in_use(parameter)) is not None:
                raise UsageError(
                    f"{type(optimizer).__name__} steps {owner.name_of(parameter)!r}, whose mask a method keeps in the "
                    f"steps of another optimizer; give each weight to one optimizer, attach to the outermost one, or "
                    f"call remove() on what attach returned."
                )
