"""MaskedLayer: a sparse weight in masked storage, with its mask as bits, which clear a tensor in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

__all__ = ["MaskedLayer", "clear_all"]

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer type by bytes per weight, to view floating-point values as bits."""


@dataclass(frozen=True, eq=False)
class MaskedLayer:
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
    def of(cls, weight: nn.Parameter, mask: torch.Tensor) -> MaskedLayer:
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

    def follow_mask(self) -> None:
        """Makes the bits again, after the mask was written."""
        self.bits.copy_(self.mask).neg_()


def clear_all(tensors: Sequence[tuple[MaskedLayer, torch.Tensor]]) -> None:
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
