"""MaskKeeper: keeps gradients, weights and optimizer state inside the masks, for any torch optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import nn, optim

from dsr_tool.errors import UsageError
from dsr_tool.sparse.active import Positions, put_
from dsr_tool.sparse.model import SparseModel

__all__ = ["MaskKeeper"]

_ZERO_STAYS_ZERO = (optim.SGD, optim.Adam, optim.AdamW, optim.RMSprop)
"""Given zero gradient, weight and state, these leave all three at zero, unless eps is zero."""

_KEPT: WeakSet[optim.Optimizer] = WeakSet()


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, eq=False)
class _Layer:
    """A sparse weight, its mask, and the mask once more as all-ones or all-zeros integers of the weight's width.

    A bitwise "and" clears three times as fast as filling under a boolean mask does on a CPU, and unlike a product it
    makes zeros of infinities. Its price is as much memory as the weight takes.
    """

    weight: nn.Parameter
    mask: torch.Tensor
    bits: torch.Tensor

    @classmethod
    def of(cls, weight: nn.Parameter, mask: torch.Tensor) -> _Layer:
        return cls(weight, mask, mask.to(_INTEGERS[weight.element_size()]).neg_())

    def fits(self, tensor: torch.Tensor) -> bool:
        """Whether the values of a tensor are as wide as the bits."""
        return tensor.element_size() == self.bits.element_size()

    def clear(self, tensor: torch.Tensor) -> None:
        """Set everything outside the mask to (positive) zero, in place."""
        if self.fits(tensor):
            tensor.view(self.bits.dtype).bitwise_and_(self.bits)
        else:
            tensor.masked_fill_(~self.mask, 0.0)


class MaskKeeper:
    """Hooks on an optimizer that keep everything outside the masks at exactly zero after every step.

    Before a step the gradients are masked. Weights, momentum and second moments then stay zero by themselves in
    the optimizers listed above; in all others, and after a step with a closure, they are masked as well.
    """

    def __init__(
        self, model: SparseModel, optimizer: optim.Optimizer, *, before_masking: Callable[[], None] | None = None
    ) -> None:
        """Mask what is there and hook into the steps to come.

        Args:
            model: the sparse model, already on its device.
            optimizer: any torch optimizer; state tensors of a weight's shape are taken as one value per weight.
            before_masking: called each time before gradients are masked, while they are still dense.

        Raises:
            UsageError: a sparse weight is not among the optimizer's parameters.
        """
        if optimizer in _KEPT:
            raise UsageError("a method is attached to this optimizer already; call remove() on what attach returned.")
        model.align_masks()
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        weights = model.weights
        self.names = model.trained
        strangers = [name for name in self.names if id(weights[name]) not in held]
        if strangers:
            raise UsageError(
                f"weight {strangers[0]!r} is not among the optimizer's parameters; make the optimizer from "
                f"model.module.parameters() after the model was moved to its device."
            )
        self.model = model
        self.optimizer = optimizer
        self._before_masking = before_masking
        self._layers = [_Layer.of(weights[name], model.masks[name]) for name in self.names]
        self._zero_outside()
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_load_state_dict_post_hook(lambda _: self._zero_outside()),
        ]
        _KEPT.add(optimizer)

    def remove(self) -> None:
        """Take the hooks off the optimizer."""
        for hook in self._hooks:
            hook.remove()
        _KEPT.discard(self.optimizer)

    @torch.no_grad()
    def move(self, dropped: Positions, grown: Positions) -> None:
        """Deactivate and activate weights; both start over with weight, gradient and optimizer state at zero.

        Args:
            dropped: active positions that become inactive.
            grown: inactive positions that become active.
        """
        layers = zip(self._layers, dropped.per_layer(), grown.per_layer(), strict=True)
        for layer, off, on in layers:
            for positions, active in ((off, 0), (on, 1)):
                put_(layer.mask, positions, active)
                put_(layer.bits, positions, -active)
            moved = torch.cat([off, on])
            for tensor in self._tensors(layer.weight):
                put_(tensor, moved, 0)

    @torch.no_grad()
    def write(self, active: Positions, values: torch.Tensor) -> None:
        """Give active weights new values, in the order of their positions; gradients and states stay as they are."""
        pieces = zip(self._layers, active.per_layer(), values.split(list(active.counts)), strict=True)
        for layer, positions, piece in pieces:
            put_(layer.weight.data, positions, piece)

    def _tensors(self, weight: nn.Parameter) -> Iterator[torch.Tensor]:
        """The weight, its gradient, and every state tensor that holds one value per weight."""
        yield weight.data
        if weight.grad is not None:
            yield weight.grad
        for value in self.optimizer.state.get(weight, {}).values():
            if isinstance(value, torch.Tensor) and value.shape == weight.shape:
                yield value

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Zero all gradients outside the masks, as happens before each step anyway.

        Raises:
            UsageError: the model was moved since, or a layer makes sparse gradients.
        """
        if self._before_masking is not None:
            self._before_masking()
        _clear_all([(self._layers[index], gradient) for index, gradient in self._gradients()])

    def _gradients(self) -> Iterator[tuple[int, torch.Tensor]]:
        """The gradient of each layer that has one, by the layer's number."""
        for index, (name, layer) in enumerate(zip(self.names, self._layers, strict=True)):
            if self.model.masks[name] is not layer.mask:
                raise UsageError(f"the mask of {name!r} was replaced since; attach after the model was moved.")
            gradient = layer.weight.grad
            if gradient is None:
                continue
            if gradient.is_sparse:
                raise UsageError(f"{name!r} makes sparse gradients, which cannot be masked; make it with sparse=False.")
            yield index, gradient

    def _before_step(self, _: optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._before_masking is not None:
            self._refuse_closure(args, kwargs)
        self.mask_gradients()

    @staticmethod
    def _refuse_closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _has_closure(args, kwargs):
            raise UsageError(
                "this method looks at the gradients before each step; call backward() first, and step() without a "
                "closure."
            )

    def _after_step(self, optimizer: optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A closure computes gradients inside the step, where no hook can mask them.
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
    """Set everything outside the masks to (positive) zero: layer by layer on a CPU, all at once on a GPU."""
    on_gpu = [(layer, tensor) for layer, tensor in tensors if tensor.is_cuda and layer.fits(tensor)]
    if on_gpu:
        # There is no "and" for lists. As integers, times -1 or 0 and negated, every value stays what it is or vanishes.
        views = [tensor.view(layer.bits.dtype) for layer, tensor in on_gpu]
        torch._foreach_mul_(views, [layer.bits for layer, _ in on_gpu])
        torch._foreach_neg_(views)
    for layer, tensor in tensors:
        if not (tensor.is_cuda and layer.fits(tensor)):
            layer.clear(tensor)


def _has_closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return any(given is not None for given in (*args[1:], kwargs.get("closure")))
