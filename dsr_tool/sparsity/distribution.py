"""Distributions: the number of active weights of each layer at the start, for a total of the network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from dsr_tool.errors import UsageError
from dsr_tool.sparsity.apportion import apportion

__all__ = [
    "DISTRIBUTIONS",
    "Lamp",
    "by_magnitude",
    "erk",
    "floors",
    "largest",
    "largest_of_each",
    "least_total",
    "uniform",
]

DISTRIBUTIONS = ("uniform", "erk", "magnitude", "lamp")
"""Names of the distributions that need only the weights."""

_FLOOR_DENSITY = Fraction(1, 10)
"""Smallest density of a layer, as a fraction of the density of the network, where floors apply."""
_CHUNK = 1 << 22
"""Weights whose sum is accumulated in float64 at a time: 32 MiB, however large the layer."""
_LARGEST_FLOAT = float(np.finfo(np.float32).max)
"""Largest finite float32, which stands for importances that overflowed."""
_EDGE_BITS = 18
"""Bits of a score below those that tell its edge, so that neighbouring edges differ by 3 to 6 %. Of ResNet-50, about
1 in 300 weights lie between two of them, and the counts at all edges take 16 kB a layer."""
_EDGES = np.arange((0x3F800000 >> _EDGE_BITS) + 2, dtype=np.int32) << _EDGE_BITS
"""Thresholds up to above 1, the largest score. As integers, the bits of non-negative floats have the order of the
floats."""


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


def floors(total: int, shapes: Sequence[tuple[int, ...]]) -> list[int]:
    """Returns the smallest number of active weights of each layer that keeps it from being starved.

    A layer keeps a tenth of the density of the network, and as many weights as it has outputs or inputs, whichever are
    more, so that a channel keeps one weight on average. A global threshold on |w| left MobileNetV2 layers of density
    3e-5 at sparsity .8, and one such layer is enough to lose what the network learned.

    Args:
        total: number of active weights of the network.
        shapes: shapes of the sparse weights: outputs, inputs, kernel dimensions.
    """
    sizes = [math.prod(shape) for shape in shapes]
    density = _FLOOR_DENSITY * total / sum(sizes)
    return [min(size, max(math.ceil(density * size), *shape[:2])) for size, shape in zip(sizes, shapes, strict=True)]


def least_total(shapes: Sequence[tuple[int, ...]]) -> int:
    """Returns the smallest total that gives every layer its floor."""
    total = 0
    # Floors grow with the total by a tenth of its growth, so this converges from below in a few rounds.
    while (needed := sum(floors(total, shapes))) > total:
        total = needed
    return total


class Lamp:
    """Layer budgets by LAMP scores (Lee et al., ICLR 2021, section 3), for any number of totals.

    The score of a weight is its squared importance divided by the sum of those in its layer that are not smaller: the
    relative error that pruning it adds to what is left. A network prunes its lowest scores first. This maximizes the
    product over all layers of the fraction of the squared importance that stays.

    The scores of one layer at a time are in memory. What stays of them is how many reach each of about 4,000 edges; the
    first total then scores the layers once more, for the few scores between the two edges around its threshold. Whoever
    asks for another total searches among many, for which all scores stay in memory.
    """

    def __init__(self, importances: Sequence[npt.NDArray[np.floating]], shares: Sequence[float] | None = None) -> None:
        """Scores every layer.

        Args:
            importances: for each layer non-negative values of any shape; with magnitudes, scores are the paper's. They
                are read one at a time, at most three times.
            shares: for each layer the fraction of what later layers read that it contributes, in (0, 1]; 1 except on
                branches that are added to others. Relative errors count by this fraction. Default: 1, the paper's.
        """
        self._importances = importances
        self._shares = shares or [1.0] * len(importances)
        found = [self._edges_of(i) for i in range(len(importances))]
        self._sizes, self._reached = [size for size, _ in found], np.array([counts for _, counts in found])
        self._between: tuple[int, list[npt.NDArray[np.int32]]] | None = None
        self._kept: list[npt.NDArray[np.int32]] | None = None

    def counts(self, total: int, least: Sequence[int]) -> list[int]:
        """Returns the number of active weights per layer: those with the highest scores, but at least the floors.

        Args:
            total: number of active weights of the network, from `sum(least)` to the number of weights.
            least: floor of each layer, at most its size.

        Returns:
            One number per layer; they sum to `total`. Of equal scores, earlier layers get theirs.

        Raises:
            UsageError: `total` is below the sum of floors or above the number of weights.
        """
        most = sum(self._sizes)
        if not sum(least) <= total <= most:
            raise UsageError(
                f"{total:,} active weights cannot be spread over these layers; they hold {sum(least):,} to {most:,}."
            )
        if not self._sizes:
            return []
        # The last edge that more weights reach than may stay: the threshold lies between it and the next one.
        reached = np.maximum(self._reached, np.array(least)[:, None]).sum(0)
        edge = max(int(np.count_nonzero(reached > total)) - 1, 0)
        between, beyond = self._scores_between(edge), self._reached[:, edge + 1]

        def above(bits: int) -> list[int]:
            """Returns how many scores of each layer are above a threshold, or its floor if that is more."""
            found = (scores.size - int(np.searchsorted(scores, bits, side="right")) for scores in between)
            return [max(count + int(more), floor) for count, more, floor in zip(found, beyond, least, strict=True)]

        # The smallest bits above which at most `total` weights lie; bisection is exact on integers.
        low, high = edge << _EDGE_BITS, ((edge + 1) << _EDGE_BITS) - 1
        while low < high:
            middle = (low + high) // 2
            if sum(above(middle)) <= total:
                high = middle
            else:
                low = middle + 1
        counts = above(low)
        missing = total - sum(counts)
        for i, tied_too in enumerate(above(low - 1)):
            tied = min(tied_too - counts[i], missing)
            counts[i] += tied
            missing -= tied
        return counts

    def _scores(self, i: int) -> npt.NDArray[np.int32]:
        return _lamp_scores(self._importances[i], self._shares[i])

    def _edges_of(self, i: int) -> tuple[int, npt.NDArray[np.int32]]:
        """Returns the size of a layer, and how many of its scores reach each edge."""
        scores = self._scores(i)
        return scores.size, (scores.size - np.searchsorted(scores, _EDGES)).astype(np.int32)

    def _scores_between(self, edge: int) -> list[npt.NDArray[np.int32]]:
        """Returns the scores of each layer from one edge up to the next, sorted."""
        if self._between is not None and self._between[0] != edge and self._kept is None:
            self._kept = [self._scores(i) for i in range(len(self._sizes))]
        if self._between is None or self._between[0] != edge:
            self._between = edge, [self._slice(i, edge) for i in range(len(self._sizes))]
        return self._between[1]

    def _slice(self, i: int, edge: int) -> npt.NDArray[np.int32]:
        first, last = self._sizes[i] - self._reached[i, edge : edge + 2]
        # Copied: a view would keep all scores of the layer.
        return self._kept[i][first:last] if self._kept is not None else self._scores(i)[first:last].copy()


def _lamp_scores(importances: npt.NDArray[np.floating], share: float) -> npt.NDArray[np.int32]:
    """Returns the bits of the scores of one layer in float32, from the smallest to the largest."""
    scores = np.abs(importances, dtype=np.float32).reshape(-1)  # a copy, changed below
    # Importances may overflow where weights do not; a NaN would have no place in any order.
    np.nan_to_num(scores, copy=False, posinf=_LARGEST_FLOAT)
    scores.sort()
    # Scores have no unit, and without this the squares of small weights would underflow.
    scores /= scores[-1] or np.float32(1)
    scores *= scores
    # What stays of the sum of other branches: nothing for a share of 1.
    rest = float(scores.sum(dtype=np.float64)) * (1 - share) / share
    for end in range(scores.size, 0, -_CHUNK):
        chunk = scores[max(end - _CHUNK, 0) : end]
        sums = np.cumsum(chunk[::-1], dtype=np.float64)[::-1] + rest
        rest = float(sums[0])
        # Zeros have the score zero, also where nothing is left to divide by.
        chunk /= np.where(sums > 0, sums, 1)
    bits: npt.NDArray[np.int32] = scores.view(np.int32)
    return bits


def largest(magnitudes: npt.NDArray[np.floating], active: int) -> npt.NDArray[np.int64]:
    """Returns the flat positions of the `active` largest entries of one layer; of equal entries the earlier ones.

    Args:
        magnitudes: non-negative values, shape (n,).
        active: number of positions, at least 1.
    """
    if active >= magnitudes.size:
        return np.arange(magnitudes.size)
    magnitudes = np.nan_to_num(magnitudes, posinf=_LARGEST_FLOAT)
    cut = np.partition(magnitudes, magnitudes.size - active)[magnitudes.size - active]
    above = np.flatnonzero(magnitudes > cut)
    return np.concatenate([above, np.flatnonzero(magnitudes == cut)[: active - len(above)]])


def largest_of_each(magnitudes: npt.NDArray[np.floating], active: int) -> npt.NDArray[np.bool_]:
    """Returns True at the `active` largest entries of every row; of equal entries the earlier ones.

    Args:
        magnitudes: non-negative values, shape (rows, n).
        active: number of entries per row, from 1 to n.
    """
    magnitudes = np.nan_to_num(magnitudes, posinf=_LARGEST_FLOAT)
    place = magnitudes.shape[1] - active
    cut = np.partition(magnitudes, place, axis=1)[:, place, None]
    above, tied = magnitudes > cut, magnitudes == cut
    missing = active - np.count_nonzero(above, axis=1, keepdims=True)
    chosen: npt.NDArray[np.bool_] = above | (tied & (tied.cumsum(axis=1, dtype=np.int32) <= missing))
    return chosen
