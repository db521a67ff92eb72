"""LatentKeeper: dense weights behind a sparse model, for methods that also train masked weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import optim

from dsr_tool.errors import UsageError
from dsr_tool.sparse.active import Positions, put_
from dsr_tool.sparse.mask_keeper import MaskKeeper
from dsr_tool.sparse.model import SparseModel

__all__ = ["LatentKeeper"]

BeforeLayerStep = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None]


class LatentKeeper(MaskKeeper):
    """Lets the optimizer step on dense weights, while everything else sees only the active ones.

    Between steps a parameter holds weight times mask, as in any sparse model: forward, evaluation and files see nothing
    else, and the gradient that autograd leaves is that of the masked weight. Inside a step the parameter holds the
    dense weight and its gradient. That takes one more copy of every weight, until `settle`.

    Attributes:
        dense: the dense weight of each layer; empty once settled.
        settled: whether the masks are final; this is then a plain `MaskKeeper`.
    """

    def __init__(self, model: SparseModel, optimizer: optim.Optimizer, before_layer_step: BeforeLayerStep) -> None:
        """Registers hooks on the optimizer.

        Args:
            model: the sparse model, already on its device.
            optimizer: as for `MaskKeeper`.
            before_layer_step: called before each step with the index, dense weight, mask and gradient of a layer; it
                turns the gradient of the masked weight into that of the dense one, in place.
        """
        # Set first: the base class looks at the weights, which asks whether this is settled.
        self.settled = self._settling = False
        self._stepped: list[int] = []
        super().__init__(model, optimizer)
        if self.view.in_parts or isinstance(self.optimizer, optim.LBFGS):
            self.remove()
            raise UsageError(
                f"this method trains weights behind their masks, with one gradient per step, and "
                f"{type(self.optimizer).__name__} takes several; take another optimizer, such as SGD or AdamW."
            )
        self._trained = self.layers
        self.dense = [layer.weight.detach().clone() for layer in self._trained]
        self._before_layer_step = before_layer_step

    @property
    def masks(self) -> list[torch.Tensor]:
        """The mask of each layer."""
        return [layer.mask for layer in self._trained]

    def restore(self, dense: list[torch.Tensor]) -> None:
        """Restores the dense weights of an earlier run; an empty list means that it was settled."""
        if not dense:
            self.settle()
        for mine, saved in zip(self.dense, dense, strict=True):
            mine.copy_(saved)

    def settle_after_move(self) -> None:
        """Settles at the end of the next `move`."""
        self._settling = True

    def settle(self) -> None:
        """Frees the dense weights, and zeroes optimizer state outside the masks."""
        self.settled, self.dense = True, []
        self._zero_outside()

    @torch.no_grad()
    def move(self, dropped: Positions, grown: Positions) -> None:
        """Prunes and grows weights; grown ones take the value of the dense weight, and optimizer state stays."""
        if self.settled:
            super().move(dropped, grown)
            return
        layers = zip(self.names, self._trained, self.dense, dropped.per_layer(), grown.per_layer(), strict=True)
        for name, layer, dense, off, on in layers:
            self._move_mask(layer, off, on)
            self._move_averages(name, off, on)
            # Neither gradient nor optimizer state is cleared: a masked weight keeps learning.
            put_(layer.weight.data, off, 0)
            put_(layer.weight.data, on, dense.take(on))
        if self._settling:
            self.settle()

    def follow(self) -> None:
        """Looks whether the weights are still those of the start.

        Raises:
            UsageError: a weight was replaced, frozen or unfrozen.
        """
        super().follow()
        # Before the end of the constructor there is nothing to compare with.
        if not self.settled and "_trained" in vars(self) and self.layers != self._trained:
            raise UsageError(
                "this method trains weights behind their masks, and others are frozen now than at the start; set "
                "requires_grad before attach."
            )

    def mask_gradients(self) -> None:
        """Masks gradients once settled. Before that, gradients of inactive weights train the dense weights."""
        if self.settled:
            super().mask_gradients()

    def _has_gradients(self) -> None:
        if self.settled:
            super()._has_gradients()
        else:
            self._to_dense()

    @torch.no_grad()
    def _to_dense(self) -> None:
        """Shows the optimizer the dense weights and their gradients; masks come back after the step."""
        if getattr(self.optimizer, "found_inf", None) is not None:
            raise UsageError(
                "this method needs true gradients before each step, but a fused optimizer unscales those of fp16 "
                "inside; train in bf16 or fp32, or make the optimizer with fused=False."
            )
        if self._stepped:
            self._stepped = []
            self._zero_outside()
            raise UsageError(
                f"{type(self.optimizer).__name__} called its closure twice in one step, and this method needs one "
                f"gradient per step; take another optimizer, such as SGD or AdamW."
            )
        for index, layer in enumerate(self._trained):
            if layer.weight.grad is not None:
                self._before_layer_step(index, self.dense[index], layer.mask, layer.weight.grad)
                layer.weight.data.copy_(self.dense[index])
                self._stepped.append(index)

    def _before_closure(self) -> None:
        # Gradients of before the closure train nothing.
        if self.settled:
            super()._before_closure()

    @torch.no_grad()
    def _tidy(self) -> None:
        if self.settled:
            super()._tidy()
            return
        # A layer without a gradient still holds its masked weight, which must not replace the dense one.
        for index in self._stepped:
            layer = self._trained[index]
            self.dense[index].copy_(layer.weight)
            layer.clear(layer.weight.data)
        self._stepped = []
        self._trust.stepped({name: layer.weight for name, layer in self._layers.items()})

    @torch.no_grad()
    def _zero_outside(self) -> None:
        if self.settled:
            super()._zero_outside()
            return
        # Weights only: momentum of masked weights belongs to the dense weights.
        for layer in self._layers.values():
            layer.clear(layer.weight.data)
