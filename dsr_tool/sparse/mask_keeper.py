"""MaskKeeper: keeps weights, gradients and optimizer state at zero outside the masks, in masked storage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import nn, optim
from torch.utils.hooks import RemovableHandle

from dsr_tool.errors import UsageError
from dsr_tool.sparse.active import Positions, put_
from dsr_tool.sparse.keeper import Keeper
from dsr_tool.sparse.masked_layer import MaskedLayer, clear_all
from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparse.ownership import claim, owned, release
from dsr_tool.sparse.places import Places
from dsr_tool.sparse.sharding import refuse_sharded
from dsr_tool.sparse.trust import Trust

__all__ = ["MaskKeeper"]


class MaskKeeper(Keeper):
    """Keeps everything outside the masks at exactly zero after every step.

    Gradients are masked before each step, or inside it when a closure has computed them. In SGD, Adam, AdamW and
    RMSprop, weights, momentum and second moments then stay zero by themselves; in all other optimizers they are masked
    after the step. Where weights change between two backward passes of a step, gradients are masked as soon as they
    are there.
    """

    def __init__(
        self, model: SparseModel, optimizer: optim.Optimizer, *, before_masking: Callable[[], None] | None = None
    ) -> None:
        """Installs the hooks. Weights are read first when the first step begins.

        Args:
            model: the sparse model, already on its device.
            optimizer: any torch optimizer. State tensors with the shape of a weight count as one value per weight.
            before_masking: called each time before gradients are masked, while they are still dense.

        Raises:
            UsageError: no sparse weight is among the optimizer's parameters, or one has a keeper already.
        """
        model.align_masks()
        super().__init__(model, optimizer, [])
        self._before_masking, self._update = before_masking, False
        self._places = Places(model)
        self._layers: dict[str, MaskedLayer] = {}
        self._owned: dict[str, nn.Parameter] = {}
        self._optimized: set[int] = set()
        self._early: dict[str, RemovableHandle] = {}
        self._trust = Trust()
        # A loaded optimizer may have momentum outside the masks, from a dense training.
        self._untidy = True
        self._refuse_others()
        self.follow()
        self.claim(self.owned_weights())

    def _refuse_others(self) -> None:
        trained, optimized = self.model.trained, self.view.parameters()
        weights = self.model.weights
        if trained and not any(id(weight) in optimized for weight in weights.values()):
            raise UsageError(
                f"weight {trained[0]!r} is not among the optimizer's parameters, and no other sparse weight is; make "
                f"the optimizer from model.module.parameters() after the model was moved to its device."
            )

    def owned_weights(self) -> Sequence[torch.Tensor]:
        """Returns the sparse weights that the optimizer has, frozen ones too."""
        return list(self._owned.values())

    def name_of(self, weight: torch.Tensor) -> str:
        """Returns the name of one of its weights."""
        return next(name for name, mine in self._owned.items() if mine is weight)

    def remove(self) -> None:
        """Removes all hooks, and gives the weights free."""
        super().remove()
        for hook in self._early.values():
            hook.remove()
        self._early = {}

    @property
    def layers(self) -> list[MaskedLayer]:
        """The layers that the method trains, in the order of `names`."""
        return [self._layers[name] for name in self.names]

    def follow(self) -> None:
        """Looks which weights the optimizer has now, and which are frozen.

        Raises:
            UsageError: a weight or a mask was replaced, or a weight has come to a second optimizer.
        """
        optimized = self.view.parameters()
        owned_now: dict[str, nn.Parameter] = {}
        for name in self._places:
            weight = self._places.weight(name)
            if weight is None or self._was_replaced(name, weight, optimized):
                refuse_sharded(self.model.module)
                raise UsageError(
                    f"{name!r} is no longer the parameter that it was; load_state_dict(assign=True), parametrizations "
                    f"and FSDP replace parameters: do that first, then make the optimizer and attach."
                )
            if id(weight) in optimized:
                owned_now[name] = weight
                self._follow_layer(name, weight)
        if optimized != self._optimized:
            if self._hooks:
                claim(self, owned_now.values(), self.optimizer)
                release(self, [mine for name, mine in self._owned.items() if owned_now.get(name) is not mine])
            self._owned, self._optimized = owned_now, optimized
            self._layers = {name: self._layers[name] for name in owned_now if name in self._layers}
        self.names = [name for name, layer in self._layers.items() if layer.weight.requires_grad]

    def _was_replaced(self, name: str, weight: nn.Parameter, optimized: set[int]) -> bool:
        if weight is self._owned.get(name, weight):
            return False
        return id(weight) not in optimized or weight.shape != self.model.masks[name].shape

    def _follow_layer(self, name: str, weight: nn.Parameter) -> None:
        layer = self._layers.get(name)
        # `SparseModel.to` makes new masks; the bits here would then belong to outdated masks.
        if layer is not None and (layer.mask is not self.model.masks[name] or layer.mask.device != weight.device):
            raise UsageError(f"the mask of {name!r} was replaced; attach after moving the model.")
        # Frozen weights need no bits until they are trained.
        if (weight.requires_grad or weight.grad is not None) and (layer is None or layer.weight is not weight):
            self._layers[name] = MaskedLayer.of(weight, self.model.masks[name])
            self._layers = {key: self._layers[key] for key in self._places if key in self._layers}
            if self.view.in_parts and weight.requires_grad:
                self._early[name] = weight.register_post_accumulate_grad_hook(self._mask_early(name))

    def expect(self, *, update: bool) -> None:
        """Leaves gradients dense until the next step if the method reads them after it."""
        self._update = update

    def check(self, *, everything: bool) -> None:
        """Raises `CheckFailed` if a weight that something else wrote is not zero outside its mask."""
        if everything:
            self._trust.forget()
        weights = ((name, self._places.weight(name)) for name in self._places)
        # Weights of another keeper are its own to check.
        mine = {name: each for name, each in weights if each is not None and owned(each) in (None, self)}
        self._trust.check(mine, self.model.masks)

    @torch.no_grad()
    def move(self, dropped: Positions, grown: Positions) -> None:
        """Deactivates and activates weights, and sets weight, gradient and optimizer state of both to zero.

        Args:
            dropped: active positions that become inactive.
            grown: inactive positions that become active.
        """
        for name, off, on in zip(self.names, dropped.per_layer(), grown.per_layer(), strict=True):
            layer = self._layers[name]
            self._move_mask(layer, off, on)
            # Dropped weights must be zero by contract; grown ones start at zero (Mostafa & Wang 2019) without momentum.
            moved = torch.cat([off, on])
            for tensor in self._tensors(layer.weight):
                put_(tensor, moved, 0)
            for tensor, start in self.view.starts_of(layer.weight):
                put_(tensor, on, start)
            self._move_averages(name, off, on)
        self.view.forget_curvature()

    @staticmethod
    def _move_mask(layer: MaskedLayer, off: torch.Tensor, on: torch.Tensor) -> None:
        for positions, active in ((off, 0), (on, 1)):
            put_(layer.mask, positions, active)
            put_(layer.bits, positions, -active)

    def _move_averages(self, name: str, off: torch.Tensor, on: torch.Tensor) -> None:
        for average in self.model.averages:
            weight, mask = average.weights[name].data, average.masks[name]
            off, on = off.to(weight.device), on.to(weight.device)
            put_(mask, off, 0)
            put_(mask, on, 1)
            put_(weight, torch.cat([off, on]), 0)

    @torch.no_grad()
    def write(self, active: Positions, values: torch.Tensor) -> None:
        """Writes values to active weights; gradients and optimizer state stay as they are.

        Args:
            active: positions of the weights.
            values: their new values, in the order of the positions.
        """
        pieces = zip(self.layers, active.per_layer(), values.split(list(active.counts)), strict=True)
        for layer, positions, piece in pieces:
            put_(layer.weight.data, positions, piece)

    @torch.no_grad()
    def restore_masks(self, masks: Mapping[str, torch.Tensor]) -> None:
        """Replaces the masks of all sparse weights; the next step looks at weights and state outside."""
        for model in (self.model, *self.model.averages):
            for name, mask in masks.items():
                model.masks[name].copy_(mask)
        for layer in self._layers.values():
            layer.follow_mask()
        self._trust.loaded()
        self._untidy = True

    def _tensors(self, weight: nn.Parameter) -> Iterator[torch.Tensor]:
        """Yields the weight, its gradient, and every state tensor that holds one value per weight."""
        yield weight.data
        if weight.grad is not None:
            yield weight.grad
        yield from self.view.state_of(weight)

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Sets all gradients outside the masks to zero. This happens before each step anyway.

        Raises:
            UsageError: the model was moved to another device since, or a layer has sparse gradients.
        """
        self.follow()
        self._has_gradients()

    @torch.no_grad()
    def _has_gradients(self) -> None:
        if self._before_masking is not None:
            self._before_masking()
        self._clear_gradients()

    def _clear_gradients(self) -> None:
        clear_all([(self._layers[name], gradient) for name, gradient in self._gradients()])

    def _before_closure(self) -> None:
        # A step in two halves takes the first one by the gradients of before, which the closure replaces.
        self._clear_gradients()

    def _mask_early(self, name: str) -> Callable[[torch.Tensor], None]:
        @torch.no_grad()
        def mask(weight: torch.Tensor) -> None:
            reads_dense = self._before_masking is not None and self._update
            if weight.grad is not None and not weight.grad.is_sparse and not reads_dense:
                self._layers[name].clear(weight.grad)

        return mask

    def _gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the name of each layer that has a gradient, and the gradient."""
        for name, layer in self._layers.items():
            gradient = layer.weight.grad
            if gradient is None:
                continue
            if gradient.is_sparse:
                raise UsageError(
                    f"{name!r} has sparse gradients, which cannot be masked; create its layer with sparse=False."
                )
            yield name, gradient

    def _prepare(self) -> None:
        if self._untidy or self._loaded:
            self._zero_outside()
            self._untidy = False

    def _tidy(self) -> None:
        if not self.view.keeps_zeros:
            self._zero_outside()
        self._trust.stepped({name: layer.weight for name, layer in self._layers.items()})

    @torch.no_grad()
    def _zero_outside(self) -> None:
        # Not the gradients: before a step, the method may still have to read them.
        for layer in self._layers.values():
            for tensor in (layer.weight.data, *self.view.state_of(layer.weight)):
                layer.clear(tensor)
