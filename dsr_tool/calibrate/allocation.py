"""Splits active weights over layers so that the summed cost of pruning is least, for a total or for multiply-adds.

Each layer has a curve: the estimated change of the network's outputs by its number of active weights. Curves are made
convex, so taking the steepest segments of all curves first is optimal for every total at which a segment ends, and
exact for single weights, since a segment is a straight line. SPDY (Frantar & Alistarh, ICML 2022, section 3.1) runs a
dynamic program over quantised densities instead, because its curves need not be convex. It answers for one limit in
time proportional to layers x levels x quantisation of the limit; here one sort answers for every total to the last
weight. A point above the lower hull, which only a dynamic program could use, is mostly noise of the measurement.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from dsr_tool.errors import UsageError
from dsr_tool.sparsity.apportion import apportion
from dsr_tool.sparsity.distribution import floors
from dsr_tool.sparsity.layers import LayerSpec

__all__ = ["Curve", "Curves"]


@dataclass(frozen=True)
class Curve:
    """Cost of one layer by its number of active weights, a decreasing convex function that is linear between points.

    Attributes:
        counts: numbers of active weights, ascending from 0 to the size of the layer; int64, shape (points,).
        costs: cost at each of them in any unit that all layers share; float64, shape (points,), 0 at the end.
        shape: shape of the weight, for the floor of the layer.
    """

    counts: npt.NDArray[np.int64]
    costs: npt.NDArray[np.float64]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, spec: LayerSpec, densities: Sequence[float], costs: Sequence[float]) -> Curve:
        """Returns the largest decreasing convex function below the points of a measurement, and below 0 at density 1.

        Args:
            spec: the layer.
            densities: densities in [0, 1], in any order.
            costs: cost at each of them; negative ones, which a noisy measurement gives, count as 0.

        Raises:
            UsageError: a cost is NaN or infinite.
        """
        values = np.asarray(costs, np.float64)
        if not np.isfinite(values).all():
            raise UsageError(
                f"the cost of pruning layer {spec.name!r} is not finite; check the weights and pictures for NaN."
            )
        points: dict[int, float] = {}
        for density, cost in zip(densities, values.tolist(), strict=True):
            count = min(max(round(density * spec.size), 0), spec.size)
            points[count] = min(max(cost, 0.0), points.get(count, math.inf))
        points[spec.size] = 0.0
        counts = np.array(sorted(points), np.int64)
        ordered = np.array([points[int(count)] for count in counts])
        # More weights never cost more: a measurement that says so is noise.
        ordered = np.maximum.accumulate(ordered[::-1])[::-1]
        if counts[0]:
            # Below the first point the line goes on; a layer without weights costs at least that.
            slope = (ordered[0] - ordered[1]) / (counts[1] - counts[0]) if len(counts) > 1 else 0.0
            counts, ordered = np.append(0, counts), np.append(ordered[0] + slope * counts[0], ordered)
        hull = _lower_hull(counts, ordered)
        return cls(counts[hull], ordered[hull], spec.shape)

    @property
    def size(self) -> int:
        """Number of weights of the layer."""
        return int(self.counts[-1])

    def cost(self, count: int) -> float:
        """Returns the cost at a number of active weights."""
        return float(np.interp(count, self.counts, self.costs))


@dataclass(frozen=True)
class Curves:
    """The curves of all sparse layers.

    Attributes:
        layers: curve of each layer by weight name, in the order of the specs.
        allow_starved: whether a layer may get less than its floor (`sparsity.distribution.floors`).
    """

    layers: Mapping[str, Curve]
    allow_starved: bool = False

    def cost(self, counts: Sequence[int]) -> float:
        """Returns the summed cost of numbers of active weights, one per layer."""
        return math.fsum(curve.cost(count) for curve, count in zip(self.layers.values(), counts, strict=True))

    def spread(self, total: int) -> list[int]:
        """Returns the number of active weights per layer that have the least summed cost; they sum to `total`.

        Each layer keeps its floor, or a proportional part of it where `total` is too small, and at least one weight.

        Raises:
            UsageError: `total` is less than one weight per layer, or more than all weights.
        """
        sizes = [curve.size for curve in self.layers.values()]
        if total > sum(sizes):
            raise UsageError(f"{total:,} active weights are more than the {sum(sizes):,} of these layers.")
        least = self._floors(total)
        if total <= sum(least):
            return apportion(total, least, least, [1] * len(least))
        return self._fill(least, [Fraction(1)] * len(sizes), Fraction(total))

    def spread_for(self, cost_per_weight: Sequence[float], limit: float) -> list[int]:
        """Returns the number of active weights per layer that have the least summed cost within a limit on their work.

        The total of active weights is free. No weight that would still fit is left out, so what remains of the limit is
        less than the work of one weight of each layer that is not full.

        Args:
            cost_per_weight: work of one weight of each layer, in any unit: multiply-adds (`LayerSpec.macs_per_weight`),
                or measured time of the layer with all weights divided by its size, which makes the spread aware of
                latency. Layers where a weight costs 0 stay full.
            limit: allowed work of all sparse layers together, in the same unit.

        Raises:
            UsageError: the limit is below one weight per layer, or a cost is negative or not finite.
        """
        if not all(math.isfinite(cost) and cost >= 0 for cost in [*cost_per_weight, limit]):
            raise UsageError(f"costs per weight and limit {limit:g} must be finite and at least 0.")
        # Rational arithmetic: a sum of floats could exceed the limit by a rounding error.
        prices = [Fraction(cost) for cost in cost_per_weight]
        curves, bound = list(self.layers.values()), Fraction(limit)
        whole = sum(price * curve.size for price, curve in zip(prices, curves, strict=True))
        # The total is not known before; floors take the part of the work that is allowed for the density.
        density = min(bound / whole, Fraction(1)) if whole else Fraction(1)
        least = self._floors(round(density * sum(curve.size for curve in curves)))
        return self._fill(_reduce(least, prices, bound), prices, bound)

    def _floors(self, total: int) -> list[int]:
        """Returns the smallest count of each layer."""
        if self.allow_starved:
            return [1] * len(self.layers)
        return floors(total, [curve.shape for curve in self.layers.values()])

    def _fill(self, least: Sequence[int], prices: Sequence[Fraction], limit: Fraction) -> list[int]:
        """Adds weights to the floors where a unit of work reduces the cost most, until nothing more fits."""
        counts = list(least)
        left = limit - sum(price * count for price, count in zip(prices, counts, strict=True))
        for layer, end in self._steepest_first(least, prices):
            room, price = end - counts[layer], prices[layer]
            # A convex curve offers its segments in order; one that does not fit leaves less than one weight's price.
            fitting = room if price * room <= left else math.floor(left / price)
            counts[layer] += fitting
            left -= price * fitting
        return counts

    def _steepest_first(self, least: Sequence[int], prices: Sequence[Fraction]) -> list[tuple[int, int]]:
        """Returns layer and last count of each segment above the floors, those with the largest gain per work first."""
        segments = []
        for layer, (curve, floor, price) in enumerate(zip(self.layers.values(), least, prices, strict=True)):
            gains = -np.diff(curve.costs) / np.diff(curve.counts)
            for index, (gain, end) in enumerate(zip(gains.tolist(), curve.counts[1:].tolist(), strict=True)):
                if end > floor:
                    segments.append((-(gain / float(price)) if price else -math.inf, layer, index, end))
        return [(layer, end) for _, layer, _, end in sorted(segments)]


def _lower_hull(counts: npt.NDArray[np.int64], costs: npt.NDArray[np.float64]) -> list[int]:
    """Returns the indices of the points on the lower convex hull (Andrew's monotone chain)."""
    hull: list[int] = []
    for i in range(len(counts)):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            # Drop b if it lies on or above the line from a to i.
            if (costs[b] - costs[a]) * (counts[i] - counts[a]) < (costs[i] - costs[a]) * (counts[b] - counts[a]):
                break
            hull.pop()
        hull.append(i)
    return hull


def _reduce(least: list[int], prices: Sequence[Fraction], limit: Fraction) -> list[int]:
    """Returns the floors, or a proportional part of them where their work exceeds the limit; at least one weight each.

    Raises:
        UsageError: not even one weight per layer is within the limit.
    """
    work = sum(price * floor for price, floor in zip(prices, least, strict=True))
    if work <= limit:
        return least
    single = sum(prices, Fraction(0))
    if single > limit:
        raise UsageError(
            f"the limit {float(limit):g} is below the work of one weight per layer, {float(single):g}; allow more."
        )
    # One weight each, and the same part of what the floors have above that.
    part = (limit - single) / (work - single)
    return [1 + math.floor(part * (floor - 1)) for floor in least]
