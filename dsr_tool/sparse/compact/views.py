"""PerLayer: what code that asks for masks or dense weights sees of a compact network, made one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

from dsr_tool.sparse.compact.store import CompactStore

__all__ = ["PerLayer"]


class PerLayer(Mapping[str, torch.Tensor]):
    """A tensor of each layer by name. Each access makes a new tensor; writing to it changes nothing."""

    def __init__(self, store: CompactStore, make: Callable[[str], torch.Tensor]) -> None:
        """Reads the store when it is asked.

        Args:
            store: the layers.
            make: makes the tensor of the layer of a name.
        """
        self._store, self._make = store, make

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._store.layers:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._store.layers)

    def __len__(self) -> int:
        return len(self._store.layers)
