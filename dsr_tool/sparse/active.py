"""The active weights of a whole network as one flat vector, which is all that methods see.

Positions are global: all sparse layers lie behind each other, each in row-major order. Whole-network vectors need
one trip to the host for the counts of all layers, where layer by layer it would be one each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparsity.granularity import groups, unit_size

__all__ = ["ActiveWeights", "Positions", "gather", "put_", "segment_counts"]


def segment_counts(flat: torch.Tensor, sizes: Sequence[int]) -> list[int]:
    """How many of the sorted integers `flat` lie in each of consecutive segments of `sizes`; one trip to the host."""
    edges = torch.tensor([0, *accumulate(sizes)], device=flat.device)
    counts: list[int] = torch.diff(torch.searchsorted(flat, edges)).tolist()
    return counts


@dataclass(frozen=True)
class Positions:
    """Some positions of a network's sparse weights.

    Attributes:
        sizes: weights per layer.
        counts: how many of the positions lie in each layer.
        flat: int64 global positions, strictly increasing, shape (sum of counts,).
    """

    sizes: tuple[int, ...]
    counts: tuple[int, ...]
    flat: torch.Tensor

    @classmethod
    def of(cls, flat: torch.Tensor, sizes: Sequence[int]) -> Positions:
        """Count sorted global positions per layer; one trip to the host."""
        return cls(tuple(sizes), tuple(segment_counts(flat, sizes)), flat)

    def per_layer(self) -> list[torch.Tensor]:
        """The positions within each layer."""
        starts = [0, *accumulate(self.sizes)]
        pieces = self.flat.split(list(self.counts))
        return [piece - start for piece, start in zip(pieces, starts, strict=False)]

    def weights_of(self, units: Sequence[int]) -> Positions:
        """Positions of units as those of all weights in them, `units[i]` consecutive ones in layer i; no host trip."""
        starts = accumulate((size * unit for size, unit in zip(self.sizes, units, strict=True)), initial=0)
        layers = zip(self.per_layer(), starts, units, strict=False)
        flat = [_within(local, unit) + start for local, start, unit in layers]
        sizes = tuple(size * unit for size, unit in zip(self.sizes, units, strict=True))
        counts = tuple(count * unit for count, unit in zip(self.counts, units, strict=True))
        return Positions(sizes, counts, torch.cat(flat) if flat else self.flat)


@dataclass(frozen=True)
class ActiveWeights:
    """What a method may look at: where the active weights are and what their values are.

    At kernel granularity whole kernels take the place of weights: sizes, counts and positions are in kernels, and the
    value of a kernel is the mean magnitude of its weights, as in the code of Mostafa & Wang 2019.

    Attributes:
        positions: the active positions.
        values: their values in float32, shape (active,), in the same order.
        gradients: for methods that ask for them, the gradient of each layer at all of its positions, flat and in
            row-major order; held for one update only.
        units: weights behind each entry, by layer: kernel sizes, or 1; none where all are 1.
    """

    positions: Positions
    values: torch.Tensor
    gradients: tuple[torch.Tensor, ...] | None = None
    units: tuple[int, ...] = ()

    @property
    def sizes(self) -> tuple[int, ...]:
        """Weights per layer."""
        return self.positions.sizes

    @property
    def counts(self) -> tuple[int, ...]:
        """Active weights per layer."""
        return self.positions.counts

    @property
    def free(self) -> list[int]:
        """Inactive positions per layer."""
        return [size - count for size, count in zip(self.sizes, self.counts, strict=True)]

    @property
    def groups(self) -> list[list[int]]:
        """Numbers of the layers between which entries can move while the number of weights stays the same."""
        return groups(self.units or [1] * len(self.sizes))


@torch.no_grad()
def gather(model: SparseModel, names: Sequence[str] | None = None) -> ActiveWeights:
    """The active weights of a model, or its active kernels, at O(weights) and without a sort.

    Args:
        model: the model.
        names: the sparse layers to look at, all that are not frozen when absent.
    """
    names = model.trained if names is None else names
    parameters = model.weights
    weights = [parameters[name] for name in names]
    units = [unit_size(weight.shape, model.granularity) for weight in weights]
    masks = [_of_units(model.masks[name], unit) for name, unit in zip(names, units, strict=True)]
    flat = torch.cat(masks).nonzero().squeeze(1)
    positions = Positions.of(flat, [len(mask) for mask in masks])
    pieces = zip(weights, positions.per_layer(), units, strict=True)
    values = torch.cat([_values(weight.detach(), local, unit) for weight, local, unit in pieces])
    return ActiveWeights(positions, values, units=tuple(units) if any(unit > 1 for unit in units) else ())


def _of_units(mask: torch.Tensor, unit: int) -> torch.Tensor:
    """A layer's mask with one entry per unit, flat."""
    return mask.reshape(-1) if unit == 1 else mask.flatten(2)[..., 0].reshape(-1)


def _within(units: torch.Tensor, unit: int) -> torch.Tensor:
    """Flat positions of all weights in some units of a layer."""
    return units if unit == 1 else (units[:, None] * unit + torch.arange(unit, device=units.device)).reshape(-1)


def _values(weight: torch.Tensor, units: torch.Tensor, unit: int) -> torch.Tensor:
    """Values of single weights, or mean magnitudes of kernels."""
    values = weight.take(_within(units, unit)).float()
    return values if unit == 1 else values.abs().reshape(-1, unit).mean(1)


def put_(tensor: torch.Tensor, positions: torch.Tensor, values: float | torch.Tensor) -> None:
    """Write one value, or one for each, at flat positions of a tensor of any memory format, in place."""
    if isinstance(values, torch.Tensor):
        values = values.to(tensor.dtype)
    else:
        values = torch.full_like(positions, values, dtype=tensor.dtype)
    if torch.are_deterministic_algorithms_enabled():
        # Positions are distinct, so either way gives the same; torch knows that of this one, which is slower.
        tensor[torch.unravel_index(positions, tensor.shape)] = values
    else:
        tensor.put_(positions, values)
