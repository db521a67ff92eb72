"""A sparse model on fake tensors, on which steps run without computing a single value."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dsr_tool.measure.memory.storages import StorageWatch
from dsr_tool.sparse.compact.store import CompactStore
from dsr_tool.sparse.model import SparseModel

__all__ = ["HollowModel"]


class HollowModel:
    """A copy of a sparse model whose tensors have shapes but no contents, so that it takes almost no memory.

    Attributes:
        fake: mode in which such tensors are made.
        module: the copied module.
        model: the copy as a sparse model, with masks of its own.
        dtype: type of the first floating-point parameter, which inputs are made in.
    """

    def __init__(self, model: SparseModel) -> None:
        # Modules may hold tensors that are neither parameters nor buffers; those stay real.
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        with self.fake:
            # deepcopy takes what the memo holds for the copy, so no real weight is ever copied.
            memo: dict[int, object] = {
                id(p): nn.Parameter(_hollow(p), p.requires_grad) for p in model.module.parameters()
            }
            memo |= {id(b): _hollow(b) for b in model.module.buffers()}
            if (store := model.store) is not None:
                memo[id(store.frozen_values)] = _hollow(store.frozen_values)
                # Plans are made from the real positions, which are only read.
                memo |= {id(real): real for real in (store.positions, store.frozen_positions)}
            self.module = copy.deepcopy(model.module, memo)
            # The masks of a compact model are made on access, and nothing holds them while it trains.
            own = model.masks if store is None else {}
            masks = {name: torch.empty(mask.shape, dtype=torch.bool) for name, mask in own.items()}
        self.model = SparseModel(self.module, model.specs, masks, model.config)
        self.dtype = next((p.dtype for p in self.module.parameters() if p.is_floating_point()), torch.float32)

    @property
    def store(self) -> CompactStore | None:
        """The values and positions of the copy; None in masked storage."""
        return self.model.store

    def register(self, watch: StorageWatch, *, masks: bool = True) -> None:
        """Adds the tensors that exist before the first step."""
        watch.add("weights", [*self.module.parameters(), *self.module.buffers()])
        if self.store is not None:
            watch.add("weights", [self.store.frozen_values])
            watch.add("positions", [self.store.positions, self.store.frozen_positions])
        elif masks:
            watch.add("masks", self.model.masks.values())


def _hollow(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype)
