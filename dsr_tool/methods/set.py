"""set: sparse evolutionary training (Mocanu et al., Nature Communications 9, 2018, Algorithm 1)."""

from __future__ import annotations

import torch

from dsr_tool.errors import UsageError
from dsr_tool.methods.base import Method, Reallocation
from dsr_tool.methods.grow import at_random
from dsr_tool.methods.prune import smallest
from dsr_tool.methods.schedule import ReallocationSchedule
from dsr_tool.sparse.active import ActiveWeights, Positions
from dsr_tool.sparsity.granularity import GRANULARITIES

__all__ = ["SET"]


class SET(Method):
    """Drop a fixed fraction of every layer, the smallest magnitudes, and grow as many at random in the same layer.

    Magnitudes of both signs are ranked together, as in the comparisons of Mostafa & Wang (2019) and Evci et al. (2020);
    the original ranks positive and negative weights apart.
    """

    name = "set"
    granularities = GRANULARITIES

    def __init__(self, schedule: ReallocationSchedule, *, drop_fraction: float = 0.14) -> None:
        """Set the method up.

        Args:
            schedule: when to reallocate.
            drop_fraction: share of a layer's active weights to move each time; 0.14 is what Mostafa & Wang used at
                sparsity 0.9.

        Raises:
            UsageError: a fraction outside (0, 1).
        """
        if not 0 < drop_fraction < 1:
            raise UsageError(f"set --drop-fraction {drop_fraction} is not allowed; give a fraction in (0, 1).")
        self.schedule = schedule
        self.drop_fraction = drop_fraction

    def due(self, step: int) -> bool:
        """Whether the schedule asks for a reallocation after this step."""
        return self.schedule.due(step)

    def update(self, weights: ActiveWeights, step: int, generator: torch.Generator) -> Reallocation:  # noqa: ARG002
        """One reallocation; every layer keeps its count, and at least one of its weights."""
        counts = [
            min(round(self.drop_fraction * active), max(active - 1, 0), free)
            for active, free in zip(weights.counts, weights.free, strict=True)
        ]
        dropped = Positions(weights.sizes, tuple(counts), weights.positions.flat[smallest(weights, counts)])
        return Reallocation(dropped, at_random(weights, counts, generator))
