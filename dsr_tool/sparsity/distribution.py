"""How a budget is spread over the layers at the start."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dsr_tool.sparsity.budget import apportion

__all__ = ["DISTRIBUTIONS", "by_magnitude", "erk", "largest", "uniform"]

DISTRIBUTIONS = ("uniform", "erk", "magnitude")


def uniform(total: int, shapes: Sequence[tuple[int, ...]]) -> list[int]:
    """Every layer at the same density (Mostafa & Wang 2019, section 3: all sparse tensors start alike).

    Args:
        total: active weights in all.
        shapes: shapes of the sparse weights.

    Returns:
        Active weights per layer, at least one each; they sum to `total`.
    """
    sizes = [math.prod(shape) for shape in shapes]
    return apportion(total, sizes, sizes, [1] * len(sizes))


def erk(total: int, shapes: Sequence[tuple[int, ...]]) -> list[int]:
    """Erdős-Rényi-Kernel: density in proportion to (sum of dimensions) / (product of dimensions).

    Evci et al. 2020 (RigL), section 3. Layers that this would make denser than dense are full, and what they
    cannot hold goes to the others in proportion.

    Args:
        total: active weights in all.
        shapes: shapes of the sparse weights, kernel dimensions included.

    Returns:
        Active weights per layer, at least one each; they sum to `total`.
    """
    sizes = [math.prod(shape) for shape in shapes]
    return apportion(total, [sum(shape) for shape in shapes], sizes, [1] * len(sizes))


def by_magnitude(total: int, weights: Sequence[npt.NDArray[np.floating]]) -> list[int]:
    """The counts that keep the `total` largest magnitudes of the whole network.

    Args:
        total: active weights in all.
        weights: the sparse weights, any shape.

    Returns:
        Active weights per layer, at least one each; they sum to `total`. Ties at the cut go to the earlier layer.
    """
    magnitudes = [np.abs(weight).reshape(-1) for weight in weights]
    # The largest of each layer is kept whatever its rank, so it takes no part in the contest.
    for magnitude in magnitudes:
        magnitude[np.argmax(magnitude)] = np.inf
    everything = np.concatenate(magnitudes)
    if total == everything.size:
        return [magnitude.size for magnitude in magnitudes]
    cut = np.partition(everything, everything.size - total)[everything.size - total]
    counts = [int(np.count_nonzero(magnitude > cut)) for magnitude in magnitudes]
    missing = total - sum(counts)
    for i, magnitude in enumerate(magnitudes):
        tied = min(int(np.count_nonzero(magnitude == cut)), missing)
        counts[i] += tied
        missing -= tied
    return counts


def largest(magnitudes: npt.NDArray[np.floating], active: int) -> npt.NDArray[np.int64]:
    """Positions of the largest entries of one layer, exactly `active` of them; of equal ones the earlier.

    Args:
        magnitudes: non-negative, flat.
        active: how many, at least 1.
    """
    if active >= magnitudes.size:
        return np.arange(magnitudes.size)
    cut = np.partition(magnitudes, magnitudes.size - active)[magnitudes.size - active]
    above = np.flatnonzero(magnitudes > cut)
    return np.concatenate([above, np.flatnonzero(magnitudes == cut)[: active - len(above)]])
