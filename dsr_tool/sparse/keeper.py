"""Keeper: what stands between a method and an optimizer. Each storage has its own; this is what they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import optim
from torch.utils.hooks import RemovableHandle

from dsr_tool.sparse.active import Positions
from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparse.optimizers import OptimizerView, closure_of, with_closure
from dsr_tool.sparse.ownership import claim, release

__all__ = ["Keeper", "trained_by"]


def trained_by(model: SparseModel, optimizer: object) -> list[str]:
    """Returns the names of the sparse weights that are not frozen and among an optimizer's parameters."""
    if model.store is not None:
        return model.trained
    optimized, weights = OptimizerView(optimizer).parameters(), model.weights
    return [name for name in model.trained if id(weights[name]) in optimized]


class Keeper(ABC):
    """Carries out what a method decides, on the weights and on the state of one optimizer. Each storage has its own.

    It follows the optimizer from step to step. A step of an optimizer that calls others, or itself through `super()`,
    is one step; a gradient that is computed inside a step is treated as one that was there before.

    Attributes:
        model: the sparse model.
        view: the optimizer, and those inside it.
        names: names of the weights that the method trains now: those of the optimizer that are not frozen.
        before_step: called at the beginning of each step, before anything changes.
        after_step: called at the end of each step with whether it was taken: a fused step after an overflow is not.
    """

    def __init__(self, model: SparseModel, optimizer: optim.Optimizer, names: list[str]) -> None:
        """Looks at the optimizer.

        Raises:
            UsageError: masks cannot be kept with this optimizer.
        """
        self.model, self.view, self.names = model, OptimizerView(optimizer), names
        self.before_step: Callable[[], None] = _nothing
        self.after_step: Callable[[bool], None] = _nothing
        self._hooks: list[RemovableHandle] = []
        self._running: optim.Optimizer | None = None
        self._loaded = False

    @property
    def optimizer(self) -> optim.Optimizer:
        """The optimizer whose step is followed."""
        return self.view.optimizer

    def claim(self, weights: Sequence[torch.Tensor]) -> None:
        """Becomes the only keeper of some weights, and installs the hooks.

        Raises:
            UsageError: a weight has a keeper already.
        """
        claim(self, weights, self.optimizer)
        for each in self.view.all:
            self._hooks += [
                each.register_step_pre_hook(self._start),
                each.register_step_post_hook(self._end),
                each.register_load_state_dict_post_hook(self._state_loaded),
            ]

    def remove(self) -> None:
        """Removes the hooks, and gives the weights free."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        release(self, self.owned_weights())

    def steps_with(self, optimizer: optim.Optimizer) -> bool:
        """Returns whether masks are kept in the steps of an optimizer."""
        return any(each is optimizer for each in self.view.all)

    def expect(self, *, update: bool) -> None:  # noqa: B027 - masked gradients are dense anyway
        """Prepares for the next step, after which the method updates or not."""

    def gradients(self) -> Sequence[torch.Tensor] | None:
        """Returns gradients of inactive weights that it kept itself, one vector per layer; None for none."""
        return None

    def check(self, *, everything: bool) -> None:  # noqa: B027 - compact storage has nothing outside the masks
        """Raises `CheckFailed` if a weight that something else wrote is not zero outside its mask.

        Args:
            everything: whether to read all weights, not only those that torch counts a write to.
        """

    @abstractmethod
    def owned_weights(self) -> Sequence[torch.Tensor]:
        """Returns the parameters of the optimizer that hold sparse weights, frozen ones too."""

    @abstractmethod
    def name_of(self, weight: torch.Tensor) -> str:
        """Returns the name of one of its weights."""

    @abstractmethod
    def follow(self) -> None:
        """Looks which weights the optimizer has now, and which are frozen.

        Raises:
            UsageError: the masks cannot be kept any longer.
        """

    @abstractmethod
    def mask_gradients(self) -> None:
        """Sets all gradients outside the masks to zero."""

    @abstractmethod
    def move(self, dropped: Positions, grown: Positions) -> None:
        """Deactivates and activates weights; grown ones start at zero, without momentum (Mostafa & Wang 2019)."""

    @abstractmethod
    def write(self, active: Positions, values: torch.Tensor) -> None:
        """Writes values to active weights; gradients and optimizer state stay as they are."""

    @abstractmethod
    def restore_masks(self, masks: Mapping[str, torch.Tensor]) -> None:
        """Replaces the masks by those of an earlier run, whose weights are loaded before or after.

        Args:
            masks: a boolean tensor on the CPU for each sparse weight, by name.
        """

    def _prepare(self) -> None:  # noqa: B027 - not every storage needs it
        """Is called before each step, once the weights are known to be inside the masks."""

    def _has_gradients(self) -> None:  # noqa: B027 - not every storage needs it
        """Is called when the gradients of a step are there; more than once if a closure computes them."""

    def _tidy(self) -> None:  # noqa: B027 - not every storage needs it
        """Is called after each step."""

    def _start(
        self, optimizer: optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Handles the beginning of a step. Returns its arguments with another closure, if it has one."""
        if self._is_part(optimizer):
            return None
        # One that is still running was ended by an exception.
        self._running = optimizer
        self.follow()
        self.before_step()
        self._prepare()
        self._loaded = False
        closure = closure_of(args, kwargs)
        if closure is None:
            self._has_gradients()
            return None
        self._before_closure()
        return with_closure(args, kwargs, self._observed(closure))

    def _end(self, optimizer: optim.Optimizer, *_: Any) -> None:
        """Handles the end of a step."""
        if self._is_part(optimizer):
            return
        # A subclass that calls step() of its base ends twice: what it does in between must be tidied up too.
        counts, self._running = self._running is optimizer, None
        left_out = self.view.left_out
        if not left_out:
            self._tidy()
        if counts:
            self.after_step(not left_out)

    def _is_part(self, optimizer: optim.Optimizer) -> bool:
        """Returns whether an optimizer is stepped by another one that is running."""
        order = [self._running is each for each in self.view.all]
        return any(order[: next(i for i, each in enumerate(self.view.all) if each is optimizer)])

    def _before_closure(self) -> None:  # noqa: B027 - not every storage needs it
        """Is called before a step that computes its gradients itself; those of before may still be read."""

    def _observed(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def observed() -> Any:
            try:
                loss = closure()
            except BaseException:
                self._running = None
                raise
            self._has_gradients()
            return loss

        return observed

    def _state_loaded(self, _: optim.Optimizer) -> None:
        self._loaded = True


def _nothing(*_: object) -> None:
    """Does nothing."""
