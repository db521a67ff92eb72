"""Distributions: the number of active weights of each layer at the start, for a total of the network."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dsr_tool.sparsity.apportion import apportion

__all__ = ["DISTRIBUTIONS", "by_magnitude", "erk", "largest", "uniform"]

DISTRIBUTIONS = ("uniform", "erk", "magnitude")
"""Values of `--distribution`."""


def uniform(total: int, shapes: Sequence[tuple[int, ...]]) -> list[int]:
    """Gives every layer the same density (Mostafa & Wang 2019, section 3: all sparse tensors start alike).

    Args:
        total: number of active weights of the network.
        shapes: shapes of the sparse weights.

    Returns:
        Number of active weights per layer, at least one each; they sum to `total`.
    """
    sizes = [math.prod(shape) for shape in shapes]
    return apportion(total, sizes, sizes, [1] * len(sizes))


def erk(total: int, shapes: Sequence[tuple[int, ...]]) -> list[int]:
    """Gives every layer a density in proportion to (sum of dimensions) / (product of dimensions).

    This is Erdős-Rényi-Kernel of Evci et al. 2020 (RigL), section 3. A layer with a density above 1 becomes dense, and
    the surplus goes to the others in proportion.

    Args:
        total: number of active weights of the network.
        shapes: shapes of the sparse weights, kernel dimensions included.

    Returns:
        Number of active weights per layer, at least one each; they sum to `total`.
    """
    sizes = [math.prod(shape) for shape in shapes]
    return apportion(total, [sum(shape) for shape in shapes], sizes, [1] * len(sizes))


def by_magnitude(total: int, weights: Sequence[npt.NDArray[np.floating]]) -> list[int]:
    """Gives every layer the weights that are among the `total` largest magnitudes of the network.

    Args:
        total: number of active weights of the network.
        weights: the sparse weights, arrays of any shape.

    Returns:
        Number of active weights per layer, at least one each; they sum to `total`. Of equal magnitudes, earlier
        layers get theirs.
    """
    magnitudes = [np.abs(weight).reshape(-1) for weight in weights]  # copies, changed below
    # The largest of each layer is kept at any rank, because no layer may be empty.
    for magnitude in magnitudes:
        magnitude[np.argmax(magnitude)] = np.inf
    everything = np.concatenate(magnitudes)
    if total == everything.size:
        return [magnitude.size for magnitude in magnitudes]
    # Partition finds the smallest kept magnitude in linear time; a sort of the network would not.
    cut = np.partition(everything, everything.size - total)[everything.size - total]
    counts = [int(np.count_nonzero(magnitude > cut)) for magnitude in magnitudes]
    missing = total - sum(counts)
    for i, magnitude in enumerate(magnitudes):
        tied = min(int(np.count_nonzero(magnitude == cut)), missing)
        counts[i] += tied
        missing -= tied
    return counts


def largest(magnitudes: npt.NDArray[np.floating], active: int) -> npt.NDArray[np.int64]:
    """Returns the flat positions of the `active` largest entries of one layer; of equal entries the earlier ones.

    Args:
        magnitudes: non-negative values, shape (n,).
        active: number of positions, at least 1.
    """
    if active >= magnitudes.size:
        return np.arange(magnitudes.size)
    cut = np.partition(magnitudes, magnitudes.size - active)[magnitudes.size - active]
    above = np.flatnonzero(magnitudes > cut)
    return np.concatenate([above, np.flatnonzero(magnitudes == cut)[: active - len(above)]])
