"""Keeper: what stands between a method and an optimizer. MaskKeeper zeroes everything outside the masks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import nn, optim
from torch.utils.hooks import RemovableHandle

from dsr_tool.errors import UsageError
from dsr_tool.sparse.active import Positions, put_
from dsr_tool.sparse.model import SparseModel

__all__ = ["Keeper", "MaskKeeper"]

_ZERO_STAYS_ZERO = (optim.SGD, optim.Adam, optim.AdamW, optim.RMSprop)
"""Optimizers that keep weight and state at zero if gradient, weight and state are zero and eps is not."""

_ATTACHED: WeakSet[optim.Optimizer] = WeakSet()
"""Optimizers that have a keeper: two of them would undo each other's updates."""

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer type by bytes per weight, to view floating-point values as bits."""


@dataclass(frozen=True, eq=False)
class _Layer:
    """A sparse weight, its mask, and the same mask as bits: all ones or all zeros in the width of the weight.

    On a CPU, a bitwise "and" clears three times as fast as `masked_fill_`, and unlike a product it turns inf into zero.
    It costs as much memory as the weight.

    Attributes:
        weight: the parameter.
        mask: boolean tensor of its shape, True where active; the model's own.
        bits: integer tensor of its shape, -1 where active, else 0.
    """

    weight: nn.Parameter
    mask: torch.Tensor
    bits: torch.Tensor

    @classmethod
    def of(cls, weight: nn.Parameter, mask: torch.Tensor) -> _Layer:
        """Returns the layer of a weight and its mask."""
        return cls(weight, mask, mask.to(_INTEGERS[weight.element_size()]).neg_())

    def fits(self, tensor: torch.Tensor) -> bool:
        """Returns whether the values of a tensor have the width of the bits; state may have another dtype."""
        return tensor.element_size() == self.bits.element_size()

    def clear(self, tensor: torch.Tensor) -> None:
        """Sets everything outside the mask to +0, in place."""
        # Not a product with the mask: inf and NaN times zero are NaN.
        if self.fits(tensor):
            tensor.view(self.bits.dtype).bitwise_and_(self.bits)
        else:
            tensor.masked_fill_(~self.mask, 0.0)


class Keeper(ABC):
    """Carries out what a method decides, on the weights and on the state of one optimizer. Each storage has its own.

    Attributes:
        model: the sparse model.
        optimizer: the optimizer.
        names: names of the weights that the method trains: all sparse ones that are not frozen.
    """

    def __init__(self, model: SparseModel, optimizer: optim.Optimizer, names: list[str]) -> None:
        """Refuses an optimizer that has a keeper.

        Raises:
            UsageError: the optimizer has a keeper already.
        """
        if optimizer in _ATTACHED:
            raise UsageError("a method is attached to this optimizer already; call remove() on what attach returned.")
        self.model, self.optimizer, self.names = model, optimizer, names
        self._hooks: list[RemovableHandle] = []

    def claim(self) -> None:
        """Marks the optimizer as having a keeper."""
        _ATTACHED.add(self.optimizer)

    def remove(self) -> None:
        """Removes the hooks from the optimizer."""
        for hook in self._hooks:
            hook.remove()
        _ATTACHED.discard(self.optimizer)

    def expect(self, *, update: bool) -> None:  # noqa: B027 - masked gradients are dense anyway
        """Prepares for the next step, after which the method updates or not."""

    def gradients(self) -> Sequence[torch.Tensor] | None:
        """Returns gradients of inactive weights that it kept itself, one vector per layer; None for none."""
        return None

    @abstractmethod
    def mask_gradients(self) -> None:
        """Sets all gradients outside the masks to zero."""

    @abstractmethod
    def move(self, dropped: Positions, grown: Positions) -> None:
        """Deactivates and activates weights; grown ones start at zero, without momentum (Mostafa & Wang 2019)."""

    @abstractmethod
    def write(self, active: Positions, values: torch.Tensor) -> None:
        """Writes values to active weights; gradients and optimizer state stay as they are."""


class MaskKeeper(Keeper):
    """Hooks on an optimizer that keep everything outside the masks at exactly zero after every step.

    Gradients are masked before each step. In SGD, Adam, AdamW and RMSprop, weights, momentum and second moments then
    stay zero by themselves. In all other optimizers, and after a step with a closure, they are masked after the step.

    Attributes:
        model: the sparse model.
        optimizer: the optimizer with the hooks.
        names: names of the weights that it masks: all sparse ones that are not frozen.
    """

    def __init__(
        self, model: SparseModel, optimizer: optim.Optimizer, *, before_masking: Callable[[], None] | None = None
    ) -> None:
        """Masks weights and state now, and installs the hooks.

        Args:
            model: the sparse model, already on its device.
            optimizer: any torch optimizer. State tensors with the shape of a weight count as one value per weight.
            before_masking: called each time before gradients are masked, while they are still dense.

        Raises:
            UsageError: a sparse weight is not among the optimizer's parameters, or the optimizer has a keeper already.
        """
        model.align_masks()
        super().__init__(model, optimizer, model.trained)
        optimized = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        weights = dict(model.module.named_parameters())
        absent = [name for name in self.names if id(weights[name]) not in optimized]
        if absent:
            raise UsageError(
                f"weight {absent[0]!r} is not among the optimizer's parameters; make the optimizer from "
                f"model.module.parameters() after the model was moved to its device."
            )
        self._before_masking = before_masking
        self._layers = [_Layer.of(weights[name], model.masks[name]) for name in self.names]
        # A loaded optimizer may have momentum outside the masks, from a dense training.
        self._zero_outside()
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_load_state_dict_post_hook(lambda _: self._zero_outside()),
        ]
        self.claim()

    @torch.no_grad()
    def move(self, dropped: Positions, grown: Positions) -> None:
        """Deactivates and activates weights, and sets weight, gradient and optimizer state of both to zero.

        Args:
            dropped: active positions that become inactive.
            grown: inactive positions that become active.
        """
        layers = zip(self._layers, dropped.per_layer(), grown.per_layer(), strict=True)
        for layer, off, on in layers:
            for positions, active in ((off, 0), (on, 1)):
                put_(layer.mask, positions, active)
                put_(layer.bits, positions, -active)
            # Dropped weights must be zero by contract; grown ones start at zero (Mostafa & Wang 2019) without momentum.
            moved = torch.cat([off, on])
            for tensor in self._tensors(layer.weight):
                put_(tensor, moved, 0)

    @torch.no_grad()
    def write(self, active: Positions, values: torch.Tensor) -> None:
        """Writes values to active weights; gradients and optimizer state stay as they are.

        Args:
            active: positions of the weights.
            values: their new values, in the order of the positions.
        """
        pieces = zip(self._layers, active.per_layer(), values.split(list(active.counts)), strict=True)
        for layer, positions, piece in pieces:
            put_(layer.weight.data, positions, piece)

    def _tensors(self, weight: nn.Parameter) -> Iterator[torch.Tensor]:
        """Yields the weight, its gradient, and every state tensor that holds one value per weight."""
        yield weight.data
        if weight.grad is not None:
            yield weight.grad
        for value in self.optimizer.state.get(weight, {}).values():
            # Step counters are scalars, and Adafactor keeps rows and columns: neither has one value per weight.
            if isinstance(value, torch.Tensor) and value.shape == weight.shape:
                yield value

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Sets all gradients outside the masks to zero. This happens before each step anyway.

        Raises:
            UsageError: the model was moved to another device since, or a layer has sparse gradients.
        """
        if self._before_masking is not None:
            self._before_masking()
        _clear_all([(self._layers[index], gradient) for index, gradient in self._gradients()])

    def _gradients(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yields the index of each layer that has a gradient, and the gradient."""
        for index, (name, layer) in enumerate(zip(self.names, self._layers, strict=True)):
            # `SparseModel.to` makes new masks; the bits here would then belong to outdated masks.
            if self.model.masks[name] is not layer.mask:
                raise UsageError(f"the mask of {name!r} was replaced; attach after moving the model.")
            gradient = layer.weight.grad
            if gradient is None:
                continue
            if gradient.is_sparse:
                raise UsageError(
                    f"{name!r} has sparse gradients, which cannot be masked; create its layer with sparse=False."
                )
            yield index, gradient

    def _before_step(self, _: optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._before_masking is not None:
            self._refuse_closure(args, kwargs)
        self.mask_gradients()

    @staticmethod
    def _refuse_closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _has_closure(args, kwargs):
            raise UsageError(
                "this method reads the gradients before each step; call backward() first, and step() without a closure."
            )

    def _after_step(self, optimizer: optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A closure computes gradients inside the step, after the hook masked them. With eps = 0, Adam divides 0 by 0.
        closure = _has_closure(args, kwargs)
        divides_by_zero = any(group.get("eps", 1) <= 0 for group in optimizer.param_groups)
        if closure or divides_by_zero or type(optimizer) not in _ZERO_STAYS_ZERO:
            self._zero_outside()

    @torch.no_grad()
    def _zero_outside(self) -> None:
        for layer in self._layers:
            for tensor in self._tensors(layer.weight):
                layer.clear(tensor)


def _clear_all(tensors: Sequence[tuple[_Layer, torch.Tensor]]) -> None:
    """Sets everything outside the masks to +0: layer by layer on a CPU, with one launch for all layers on a GPU."""
    on_gpu = [(layer, tensor) for layer, tensor in tensors if tensor.is_cuda and layer.fits(tensor)]
    if on_gpu:
        # torch has no `_foreach` for "and". As integers, a value times -1 (active) or 0, negated, is itself or zero.
        views = [tensor.view(layer.bits.dtype) for layer, tensor in on_gpu]
        torch._foreach_mul_(views, [layer.bits for layer, _ in on_gpu])
        torch._foreach_neg_(views)
    for layer, tensor in tensors:
        if not (tensor.is_cuda and layer.fits(tensor)):
            layer.clear(tensor)


def _has_closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return any(argument is not None for argument in (*args[1:], kwargs.get("closure")))
