"""Rebuilding: a dense weight for one layer at a time, for whatever has no kernel for compact storage.

The dense weight lives as long as the operation that reads it. What autograd would keep of it for the backward pass is
replaced by a note to build it again, and its gradient is cut down to the active positions at once.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from dsr_tool.sparse.pattern import join_blocks, largest_of_rows, split_blocks

if TYPE_CHECKING:
    from dsr_tool.sparse.compact.store import CompactStore

__all__ = ["Rebuilt", "light", "rebuild"]


@dataclass(frozen=True)
class Rebuilt:
    """The layer of a store whose dense weight is built.

    Attributes:
        store: the store.
        name: name of the layer.
    """

    store: CompactStore
    name: str

    def build(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the dense weight with these values at the active positions."""
        layer = self.store.layers[self.name]
        dense = values.new_zeros(layer.size)
        # The positions are distinct, so the result does not depend on the order of writing.
        return dense.index_copy_(0, self.store.positions_of(self.name).long(), values.detach()).view(layer.shape)

    def keep_largest(self, gradient: torch.Tensor) -> None:
        """Keeps the gradients of all active weights, and as many of the inactive ones, the largest.

        A method that grows by gradients never grows more than it prunes, so these are all that it can choose. At fan-in
        and N:M that holds for every block.

        Raises:
            RuntimeError: the layer has a gradient of this step already, to which this one would have to be added.
        """
        if self.name in self.store.gradients:
            raise RuntimeError(
                f"{self.name!r} has two gradients in one step, and compact storage keeps only the largest of each; "
                f"for a method that grows by gradients, give such a network or loop --storage masked."
            )
        layer = self.store.layers[self.name]
        active = self.store.positions_of(self.name).long()
        score = gradient.abs().nan_to_num_(nan=torch.inf, posinf=torch.inf)
        score[active] = -1.0
        blocks = self.store.granularity.blocks(layer.shape)
        if blocks is None:
            largest = score.topk(min(layer.count, layer.size - layer.count), sorted=False).indices
        else:
            rows, count = split_blocks(score, blocks), layer.count // blocks.count
            flags = largest_of_rows(rows, min(count, blocks.size - count))
            largest = join_blocks(flags, blocks).nonzero().squeeze(1)
        kept = torch.cat([active, largest])
        self.store.gradients[self.name] = (kept, gradient[kept].float())


class _Rebuild(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, layer: Rebuilt) -> torch.Tensor:
        ctx.layer = layer
        return layer.build(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        flat = gradients[0].reshape(-1)
        layer: Rebuilt = ctx.layer
        if layer.store.wants_gradients:
            layer.keep_largest(flat)
        return flat.index_select(0, layer.store.positions_of(layer.name).long()), None


_LIVE: dict[int, tuple[StorageWeakRef, weakref.ref[CompactStore], str]] = {}
"""The dense weights that exist now, with their stores and the names of their layers, by the address of their storage's
head, which a weak reference keeps taken. A store of which nothing else is left must not stay in memory for this."""


def rebuild(values: torch.Tensor, layer: Rebuilt) -> torch.Tensor:
    """Returns the dense weight of a layer, differentiable once.

    Args:
        values: values of the active weights, shape (active,).
        layer: the layer.
    """
    dense: torch.Tensor = _Rebuild.apply(values, layer)
    for key in [key for key, (reference, *_) in _LIVE.items() if reference.expired()]:
        del _LIVE[key]
    storage = dense.untyped_storage()
    _LIVE[storage._cdata] = (StorageWeakRef(storage), weakref.ref(layer.store), layer.name)
    return dense


@dataclass(frozen=True)
class _Note:
    """A dense weight that is built again in the backward pass, as the view that was saved."""

    layer: Rebuilt
    values: torch.Tensor
    written: int
    version: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def open(self) -> torch.Tensor:
        if (self.layer.store.version, self.values._version) != (self.version, self.written):
            raise RuntimeError(
                f"the weight {self.layer.name!r} changed between forward and backward pass; call backward() before the "
                f"optimizer's step."
            )
        return self.layer.build(self.values).as_strided(self.size, self.stride, self.offset)


def _pack(tensor: torch.Tensor) -> torch.Tensor | _Note:
    known = _LIVE.get(tensor.untyped_storage()._cdata)
    store = None if known is None or known[0].expired() else known[1]()
    if known is None or store is None:
        return tensor
    layer = Rebuilt(store, known[2])
    values = layer.store.values_of(layer.name).detach()
    size, stride, offset = tensor.size(), tensor.stride(), int(tensor.storage_offset())
    return _Note(layer, values, values._version, layer.store.version, size, stride, offset)


def _unpack(saved: torch.Tensor | _Note) -> torch.Tensor:
    return saved.open() if isinstance(saved, _Note) else saved


@contextmanager
def light() -> Iterator[None]:
    """Saves no dense weight for the backward pass of anything that is computed inside."""
    with saved_tensors_hooks(_pack, _unpack):
        yield
