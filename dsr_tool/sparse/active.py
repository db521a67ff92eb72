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


@dataclass(frozen=True)
class ActiveWeights:
    """What a method may look at: where the active weights are and what their values are.

    Attributes:
        positions: the active positions.
        values: their values in float32, shape (active,), in the same order.
        gradients: for methods that ask for them, the gradient of each layer at all of its positions, flat and in
            row-major order; held for one update only.
    """

    positions: Positions
    values: torch.Tensor
    gradients: tuple[torch.Tensor, ...] | None = None

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


@torch.no_grad()
def gather(model: SparseModel, names: Sequence[str] | None = None) -> ActiveWeights:
    """The active weights of a model, at O(weights) and without a sort.

    Args:
        model: the model.
        names: the sparse layers to look at, all that are not frozen when absent.
    """
    names = model.trained if names is None else names
    parameters = model.weights
    weights = [parameters[name] for name in names]
    flat = torch.cat([model.masks[name].reshape(-1) for name in names]).nonzero().squeeze(1)
    positions = Positions.of(flat, [weight.numel() for weight in weights])
    pieces = zip(weights, positions.per_layer(), strict=True)
    values = torch.cat([weight.detach().take(local).float() for weight, local in pieces])
    return ActiveWeights(positions, values)


def put_(tensor: torch.Tensor, positions: torch.Tensor, value: float) -> None:
    """Write `value` at flat positions of a tensor of any memory format, in place."""
    values = torch.full_like(positions, value, dtype=tensor.dtype)
    if torch.are_deterministic_algorithms_enabled():
        # Positions are distinct, so either way gives the same; torch knows that of this one, which is slower.
        tensor[torch.unravel_index(positions, tensor.shape)] = values
    else:
        tensor.put_(positions, values)
