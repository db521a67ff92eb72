"""dsr: dynamic sparse reparameterization (Mostafa & Wang, ICML 2019, Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from dsr_tool.errors import UsageError
from dsr_tool.methods.base import Method, Reallocation
from dsr_tool.methods.grow import at_random
from dsr_tool.methods.prune import below_threshold, keep_at_least
from dsr_tool.methods.schedule import ReallocationSchedule
from dsr_tool.sparse.active import ActiveWeights, Positions
from dsr_tool.sparsity.budget import apportion
from dsr_tool.sparsity.granularity import GRANULARITIES

__all__ = ["DSR"]


class DSR(Method):
    """Drop below one global threshold, regrow across layers in proportion to the survivors, adapt the threshold.

    Beyond the paper, the count stays exact in the corners: a layer keeps its largest weight rather than be
    emptied; what a full layer cannot take goes to the others in proportion; and when the free positions of the
    whole network are fewer than the weights to drop, the largest of those stay.

    At kernel granularity it moves whole kernels, whose magnitude is the mean of their weights', and kernels go to
    layers with kernels of the same size only, so that the number of weights stays exact as well.
    """

    name = "dsr"
    granularities = GRANULARITIES

    def __init__(
        self,
        schedule: ReallocationSchedule,
        *,
        target: float = 0.15,
        tolerance: float = 0.1,
        threshold: float = 1e-3,
        cross_layer: bool = True,
    ) -> None:
        """Set the method up.

        Args:
            schedule: when to reallocate.
            target: N_p, how many weights (or kernels) to move each time: a number (1 or more) or a fraction of the
                active ones (below 1). The paper's runs at sparsity 0.9 moved 0.15 to 0.18 of them.
            tolerance: δ, how far from the target a move may be, as a fraction, before the threshold changes.
            threshold: the first threshold H.
            cross_layer: whether layers share what was dropped; if not, each grows as many as it dropped.

        Raises:
            UsageError: a value outside its range.
        """
        for name, value, good in (
            ("target", target, 0 < target < math.inf),
            ("tolerance", tolerance, 0 <= tolerance < 1),
            ("threshold", threshold, 0 < threshold < math.inf),
        ):
            if not good:
                raise UsageError(f"dsr --{name} {value} is not allowed; give a positive number (tolerance below 1).")
        if not isinstance(cross_layer, bool):
            raise UsageError(f"dsr cross-layer {cross_layer!r} is not allowed; give true or false.")
        self.schedule = schedule
        self.target = target
        self.tolerance = tolerance
        self.threshold = threshold
        self.cross_layer = cross_layer

    def due(self, step: int) -> bool:
        """Whether the schedule asks for a reallocation after this step."""
        return self.schedule.due(step)

    def update(self, weights: ActiveWeights, step: int, generator: torch.Generator) -> Reallocation:  # noqa: ARG002
        """One reallocation; the threshold adapts to how many weights lay below it."""
        below = below_threshold(weights, self.threshold)
        groups = weights.groups if self.cross_layer else [[i] for i in range(len(weights.sizes))]
        drop = keep_at_least(weights, below, groups)
        dropped = Positions.of(weights.positions.flat[drop], weights.sizes)
        grown = at_random(weights, _shares(weights, dropped, groups), generator)
        facts = {"threshold": self.threshold}
        self._adapt(int(torch.count_nonzero(below)), sum(weights.counts))
        return Reallocation(dropped, grown, facts)

    def _adapt(self, below: int, active: int) -> None:
        """Algorithm 1, step 3: halve H when too many fell below it, double it when too few did."""
        target = self.target if self.target >= 1 else self.target * active
        if below > (1 + self.tolerance) * target:
            self.threshold /= 2
        # With every weight below it, a higher threshold could drop no more.
        elif below < min((1 - self.tolerance) * target, active):
            self.threshold *= 2

    def state_dict(self) -> dict[str, Any]:
        """The threshold."""
        return {"threshold": self.threshold}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the threshold back."""
        self.threshold = float(state["threshold"])


def _shares(weights: ActiveWeights, dropped: Positions, groups: Sequence[Sequence[int]]) -> list[int]:
    """Algorithm 1, step 4: what a group dropped, in proportion to the survivors of its layers."""
    counts = [0] * len(weights.sizes)
    for layers in groups:
        survivors = [weights.counts[i] - dropped.counts[i] for i in layers]
        total = sum(dropped.counts[i] for i in layers)
        for i, count in zip(layers, apportion(total, survivors, [weights.free[i] for i in layers]), strict=True):
            counts[i] = count
    return counts
