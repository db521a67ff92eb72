"""LayerCounts: how many active weights each sparse layer of a module gets under a distribution, for any total."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from typing import overload

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from dsr_tool.sparse.in_file import read
from dsr_tool.sparsity.distribution import Lamp, by_magnitude, erk, floors, least_total, uniform
from dsr_tool.sparsity.layers import LayerSpec

__all__ = ["LayerCounts"]


class LayerCounts:
    """The layer budgets of a distribution.

    Attributes:
        least: smallest total that gives every layer its floor; 0 for distributions without floors.
    """

    def __init__(
        self,
        module: nn.Module,
        sparse: Sequence[LayerSpec],
        distribution: str,
        *,
        importance: Mapping[str, torch.Tensor],
        shares: Mapping[str, float],
        fresh: Collection[str],
        allow_starved: bool,
    ) -> None:
        """Takes what `Sparsifier` was given; see there."""
        self._module, self._sparse, self._distribution = module, sparse, distribution
        self._importance, self._shares = importance, shares
        self._shapes = [spec.shape for spec in sparse]
        self._trained = [i for i, spec in enumerate(sparse) if spec.name not in fresh]
        self._has_floors = distribution == "lamp" and not allow_starved
        self.least = least_total(self._shapes) if self._has_floors and sparse else 0

    def __call__(self, total: int) -> list[int]:
        """Returns the active weights of each sparse layer; they sum to `total`."""
        shapes = self._shapes
        if self._distribution in ("uniform", "erk"):
            return (uniform if self._distribution == "uniform" else erk)(total, shapes)
        trained = self._trained
        least = floors(total, shapes) if self._has_floors else [1] * len(shapes)
        counts = uniform(total, shapes)
        # Near the smallest total, an even share of the fresh layers would take from the floors of the others.
        if sum(counts[i] for i in trained) < sum(least[i] for i in trained):
            counts = list(least)
        left = total - sum(counts[i] for i in range(len(shapes)) if i not in trained)
        if self._distribution == "magnitude":
            shared = by_magnitude(left, [self._values(self._sparse[i].name) for i in trained]) if trained else []
        else:
            shared = self._lamp.counts(left, [least[i] for i in trained])
        for i, number in zip(trained, shared, strict=True):
            counts[i] = number
        return counts

    @cached_property
    def _lamp(self) -> Lamp:
        # Sorted once for all totals: a search for a budget in bytes or multiply-adds asks for a dozen.
        names = [self._sparse[i].name for i in self._trained]
        return Lamp(_Arrays(names, self._scored), [self._shares.get(name, 1.0) for name in names])

    def _scored(self, name: str) -> npt.NDArray[np.float32]:
        scored: npt.NDArray[np.float32]
        scored = self._importance[name].cpu().numpy() if name in self._importance else self._values(name)
        return scored

    def _values(self, name: str) -> npt.NDArray[np.float32]:
        # On the CPU with numpy, so that the counts do not depend on the device.
        values: npt.NDArray[np.float32] = read(self._module.get_parameter(name)).float().cpu().numpy()
        return values


class _Arrays(Sequence[npt.NDArray[np.float32]]):
    """An array of each layer, made on access, so that one of them is in memory at a time."""

    def __init__(self, names: Sequence[str], make: Callable[[str], npt.NDArray[np.float32]]) -> None:
        self._names, self._make = names, make

    @overload
    def __getitem__(self, index: int) -> npt.NDArray[np.float32]: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[npt.NDArray[np.float32]]: ...

    def __getitem__(self, index: int | slice) -> npt.NDArray[np.float32] | Sequence[npt.NDArray[np.float32]]:
        return _Arrays(self._names[index], self._make) if isinstance(index, slice) else self._make(self._names[index])

    def __len__(self) -> int:
        return len(self._names)
