"""The active weights of a whole network as one flat vector: the view of the model that methods get.

Positions are global: the sparse layers follow each other, each in row-major order. One vector for the network needs one
synchronisation with the device for the counts of all layers; layer by layer it would be one each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from dsr_tool.sparse.compact.store import CompactStore
from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparsity.granularity import Blocks, groups

__all__ = ["ActiveWeights", "Positions", "gather", "global_positions", "put_", "segment_counts"]


def segment_counts(flat: torch.Tensor, sizes: Sequence[int]) -> list[int]:
    """Counts how many of the sorted integers `flat` lie in each of the consecutive segments of `sizes`.

    This is one synchronisation with the device.
    """
    edges = torch.tensor([0, *accumulate(sizes)], device=flat.device)
    # One binary search per layer; counting in the masks would read all weights again.
    counts: list[int] = torch.diff(torch.searchsorted(flat, edges)).tolist()
    return counts


@dataclass(frozen=True)
class Positions:
    """A set of positions in the sparse weights of a network.

    Attributes:
        sizes: number of weights per layer.
        counts: number of positions per layer.
        flat: int64 global positions, strictly increasing, shape (sum of counts,).
    """

    sizes: tuple[int, ...]
    counts: tuple[int, ...]
    flat: torch.Tensor

    @classmethod
    def of(cls, flat: torch.Tensor, sizes: Sequence[int]) -> Positions:
        """Returns sorted global positions with their counts per layer; one synchronisation with the device."""
        return cls(tuple(sizes), tuple(segment_counts(flat, sizes)), flat)

    def per_layer(self) -> list[torch.Tensor]:
        """Returns the positions within each layer, each counted from the start of the layer."""
        starts = [0, *accumulate(self.sizes)]
        pieces = self.flat.split(list(self.counts))
        return [piece - start for piece, start in zip(pieces, starts, strict=False)]

    def weights_of(self, units: Sequence[int]) -> Positions:
        """Expands positions of units to the positions of their weights, without synchronising with the device.

        Args:
            units: number of weights per unit, by layer; the weights of a unit are consecutive.
        """
        starts = accumulate((size * unit for size, unit in zip(self.sizes, units, strict=True)), initial=0)
        layers = zip(self.per_layer(), starts, units, strict=False)
        flat = [_within(local, unit) + start for local, start, unit in layers]
        sizes = tuple(size * unit for size, unit in zip(self.sizes, units, strict=True))
        counts = tuple(count * unit for count, unit in zip(self.counts, units, strict=True))
        return Positions(sizes, counts, torch.cat(flat) if flat else self.flat)


@dataclass(frozen=True)
class ActiveWeights:
    """Positions and values of the active weights of a network.

    At kernel granularity, kernels take the place of weights: sizes, counts and positions are in kernels, and the value
    of a kernel is the mean magnitude of its weights, as in the code of Mostafa & Wang 2019.

    Attributes:
        positions: active positions.
        values: their values in float32, shape (active,), in the same order.
        gradients: gradient of each layer at all of its positions, flat and in row-major order, valid for one update;
            None unless the method asks for gradients. In compact storage each is made on access, and zero at inactive
            positions but for the largest, as many as the layer has active weights.
        momentum: the optimizer's momentum of each value, float32 of shape (active,); None unless the method asks.
        units: number of weights per entry, by layer: kernel sizes, or 1; empty if all are 1.
        blocks: for each layer the blocks that all keep their number of active weights, at fan-in and N:M; else empty.
    """

    positions: Positions
    values: torch.Tensor
    gradients: Sequence[torch.Tensor] | None = None
    units: tuple[int, ...] = ()
    momentum: torch.Tensor | None = None
    blocks: tuple[Blocks, ...] = ()

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of weights per layer."""
        return self.positions.sizes

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of active weights per layer."""
        return self.positions.counts

    @property
    def free(self) -> list[int]:
        """Number of inactive positions per layer."""
        return [size - count for size, count in zip(self.sizes, self.counts, strict=True)]

    @property
    def groups(self) -> list[list[int]]:
        """Indices of layers with units of one size: within a group, entries can be exchanged one for one."""
        return groups(self.units or [1] * len(self.sizes))


@torch.no_grad()
def gather(model: SparseModel, names: Sequence[str] | None = None) -> ActiveWeights:
    """Returns the active weights of a model, or its active kernels, in O(weights) and without a sort.

    Args:
        model: the model.
        names: sparse weights to read; default: all that are not frozen.
    """
    names = model.trained if names is None else names
    granularity = model.granularity
    shapes = [model.specs[name].shape for name in names]
    units = [granularity.unit(shape) for shape in shapes]
    found = _gather_masked(model, names, units) if model.store is None else _gather_compact(model.store, names, units)
    blocks = (granularity.blocks(shape) for shape in shapes)
    return replace(found, blocks=tuple(each for each in blocks if each is not None))


def _gather_masked(model: SparseModel, names: Sequence[str], units: Sequence[int]) -> ActiveWeights:
    """Returns the active weights of a model in masked storage, in O(weights)."""
    parameters = model.weights
    weights = [parameters[name] for name in names]
    # One `nonzero` for the whole network: its size must reach the host before the tensor can be allocated.
    masks = [_of_units(model.masks[name], unit) for name, unit in zip(names, units, strict=True)]
    flat = torch.cat(masks).nonzero().squeeze(1)
    positions = Positions.of(flat, [len(mask) for mask in masks])
    pieces = zip(weights, positions.per_layer(), units, strict=True)
    values = torch.cat([_values(weight.detach(), local, unit) for weight, local, unit in pieces])
    return ActiveWeights(positions, values, units=tuple(units) if any(unit > 1 for unit in units) else ())


def _gather_compact(store: CompactStore, names: Sequence[str], units: Sequence[int]) -> ActiveWeights:
    """Returns the active weights of a model in compact storage, in O(active)."""
    layers = [store.layers[name] for name in names]
    sizes = [layer.size // unit for layer, unit in zip(layers, units, strict=True)]
    counts = tuple(layer.count // unit for layer, unit in zip(layers, units, strict=True))
    values = [_means(store.values_of(name).detach().float(), unit) for name, unit in zip(names, units, strict=True)]
    positions = Positions(tuple(sizes), counts, global_positions(store, names, units))
    joined = torch.cat(values) if values else store.values.detach()[:0].float()
    return ActiveWeights(positions, joined, units=tuple(units) if any(unit > 1 for unit in units) else ())


def global_positions(store: CompactStore, names: Sequence[str], units: Sequence[int]) -> torch.Tensor:
    """Returns the positions of layers in compact storage, counted through the layers: int64, shape (active,).

    Args:
        store: the layers.
        names: names of trained layers, in the order of the store.
        units: number of weights per unit, by layer; positions are those of units.
    """
    sizes = (store.layers[name].size // unit for name, unit in zip(names, units, strict=True))
    starts = accumulate(sizes, initial=0)
    pieces = [
        _units_of(store.positions_of(name), unit).add_(start)
        for name, unit, start in zip(names, units, starts, strict=False)
    ]
    return torch.cat(pieces) if pieces else store.positions[:0].long()


def _units_of(positions: torch.Tensor, unit: int) -> torch.Tensor:
    """Returns the units of the sorted positions of a layer as int64, in a new tensor."""
    # The weights of a unit are consecutive and share their state, so every unit-th position is the first of one.
    return positions.long() if unit == 1 else positions[::unit].long() // unit


def _of_units(mask: torch.Tensor, unit: int) -> torch.Tensor:
    """Returns the mask of a layer with one entry per unit, flat; the weights of a unit share their state."""
    # Any weight of a kernel says whether the kernel is active.
    return mask.reshape(-1) if unit == 1 else mask.flatten(2)[..., 0].reshape(-1)


def _within(units: torch.Tensor, unit: int) -> torch.Tensor:
    """Returns the flat positions of all weights in some units of a layer."""
    # A unit is the last dimensions of the weight, which are contiguous in row-major order.
    return units if unit == 1 else (units[:, None] * unit + torch.arange(unit, device=units.device)).reshape(-1)


def _values(weight: torch.Tensor, units: torch.Tensor, unit: int) -> torch.Tensor:
    """Returns the values of single weights, or the mean magnitudes of kernels."""
    # `take` counts in row-major order in every memory format.
    return _means(weight.take(_within(units, unit)).float(), unit)


def _means(values: torch.Tensor, unit: int) -> torch.Tensor:
    return values if unit == 1 else values.abs().reshape(-1, unit).mean(1)


def put_(tensor: torch.Tensor, positions: torch.Tensor, values: float | torch.Tensor) -> None:
    """Writes one value, or one for each position, at flat positions of a tensor of any memory format, in place."""
    if isinstance(values, torch.Tensor):
        values = values.to(tensor.dtype)
    else:
        values = torch.full_like(positions, values, dtype=tensor.dtype)
    if torch.are_deterministic_algorithms_enabled():
        # `put_` counts as nondeterministic because positions may repeat. These do not, so the results are the same, but
        # torch accepts only the slower indexing.
        tensor[torch.unravel_index(positions, tensor.shape)] = values
    else:
        tensor.put_(positions, values)
