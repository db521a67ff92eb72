"""What code that asks for masks and dense weights sees of a compact network: one layer at a time, made on access."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from dsr_tool.sparse.compact.store import CompactStore

__all__ = ["DenseWeights", "Masks"]


class Masks(Mapping[str, torch.Tensor]):
    """The masks of a store by name. Each access makes a new boolean tensor; writing to it changes nothing."""

    def __init__(self, store: CompactStore) -> None:
        """Reads the store when it is asked."""
        self._store = store

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._store.layers:
            raise KeyError(name)
        return self._store.mask(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._store.layers)

    def __len__(self) -> int:
        return len(self._store.layers)


class DenseWeights(Mapping[str, torch.Tensor]):
    """The dense weights of a store by name, detached. Each access makes a new tensor; writing to it changes nothing."""

    def __init__(self, store: CompactStore) -> None:
        """Reads the store when it is asked."""
        self._store = store

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._store.layers:
            raise KeyError(name)
        return self._store.dense(name).detach()

    def __iter__(self) -> Iterator[str]:
        return iter(self._store.layers)

    def __len__(self) -> int:
        return len(self._store.layers)
