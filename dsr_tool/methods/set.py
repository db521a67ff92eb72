"""set: sparse evolutionary training (Mocanu et al., Nature Communications 9, 2018, Algorithm 1)."""

from __future__ import annotations

from typing import ClassVar

import torch

from dsr_tool.errors import UsageError
from dsr_tool.methods.base import Method, Reallocation
from dsr_tool.methods.blocks import grow_in_blocks, with_room
from dsr_tool.methods.grow import at_random
from dsr_tool.methods.prune import drop_counts, smallest
from dsr_tool.methods.schedule import ReallocationSchedule, Timing
from dsr_tool.sparse.active import ActiveWeights, Positions
from dsr_tool.sparse.model import STORAGES
from dsr_tool.sparsity.granularity import GRANULARITIES

__all__ = ["SET"]


class SET(Method):
    """Prunes a fixed fraction of every layer, the smallest magnitudes, and grows as many at random in the same layer.

    Magnitudes of both signs are ranked together, as in the comparisons of Mostafa & Wang (2019) and Evci et al. (2020);
    the original ranks positive and negative weights apart. At fan-in and N:M, every output or group grows what it
    pruned.
    """

    name = "set"
    summary = "prunes a share of every layer, grows at random in the same layer"
    layers_may_change = True
    granularities = GRANULARITIES
    storages = STORAGES
    fine_tuning: ClassVar = {"drop_fraction": 0.03, "stop": 0.5}  # as dsr

    def __init__(self, schedule: ReallocationSchedule, *, drop_fraction: float = 0.14) -> None:
        """Sets the method up.

        Args:
            schedule: steps at which to reallocate.
            drop_fraction: share of a layer's active weights to prune per update; Mostafa & Wang used 0.14 at sparsity
                0.9.

        Raises:
            UsageError: the fraction is outside (0, 1).
        """
        if not 0 < drop_fraction < 1:
            raise UsageError(f"set --drop-fraction {drop_fraction} is not allowed; give a fraction in (0, 1).")
        self.schedule = schedule
        self.drop_fraction = drop_fraction

    @classmethod
    def default_schedule(cls, timing: Timing) -> ReallocationSchedule:
        """Returns the schedule of dsr, as in the comparison of Mostafa & Wang."""
        return ReallocationSchedule.spread(**timing)

    def due(self, step: int) -> bool:
        """Returns whether the schedule has a reallocation after this step."""
        return self.schedule.due(step)

    def update(self, weights: ActiveWeights, step: int, generator: torch.Generator) -> Reallocation:  # noqa: ARG002
        """Returns one reallocation that leaves the number of active weights of every layer unchanged."""
        counts = drop_counts(self.drop_fraction, weights.counts, weights.free)
        if weights.blocks:
            drop = with_room(weights, smallest(weights, counts))
            # Random scores choose among the free positions of a block, each equally likely.
            scores = (torch.rand(size, device=drop.device, generator=generator) for size in weights.sizes)
            return Reallocation(*grow_in_blocks(weights, drop, scores, again=False))
        dropped = Positions(weights.sizes, tuple(counts), weights.positions.flat[smallest(weights, counts)])
        return Reallocation(dropped, at_random(weights, counts, generator))
