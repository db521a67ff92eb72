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
from dsr_tool.methods.schedule import ReallocationSchedule, Timing
from dsr_tool.sparse.active import ActiveWeights, Positions
from dsr_tool.sparsity.apportion import apportion
from dsr_tool.sparsity.granularity import GRANULARITIES

__all__ = ["DSR"]


class DSR(Method):
    """Prunes below one global threshold, grows across layers in proportion to the survivors, adapts the threshold.

    Beyond the paper, the number of active weights is exact in every case: a layer keeps its largest weight instead of
    becoming empty; the share of a layer that is full goes to the others in proportion; and if the whole network has
    fewer free positions than weights to prune, the largest of these stay.

    At kernel granularity it prunes and grows whole kernels. The magnitude of a kernel is the mean of its weights'. A
    kernel grows only in layers with kernels of the same size, so that the number of weights is exact as well.
    """

    name = "dsr"
    summary = "prunes below one global threshold, grows across layers"
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
        """Sets the method up.

        Args:
            schedule: steps at which to reallocate.
            target: N_p, the number of weights (or kernels) to prune per update: a number (1 or more) or a fraction of
                the active ones (below 1). The paper's runs at sparsity 0.9 pruned 0.15 to 0.18 of them.
            tolerance: δ, the relative deviation from the target at which the threshold changes.
            threshold: the first threshold H.
            cross_layer: whether layers share what was pruned; if not, each grows as many as it pruned.

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

    @classmethod
    def default_schedule(cls, timing: Timing) -> ReallocationSchedule:
        """Returns the paper's schedule for CIFAR-10 (appendix)."""
        return ReallocationSchedule.spread(**timing)

    def due(self, step: int) -> bool:
        """Returns whether the schedule has a reallocation after this step."""
        return self.schedule.due(step)

    def update(self, weights: ActiveWeights, step: int, generator: torch.Generator) -> Reallocation:  # noqa: ARG002
        """Returns one reallocation, and adapts the threshold to the number of weights below it."""
        below = below_threshold(weights, self.threshold)
        groups = weights.groups if self.cross_layer else [[i] for i in range(len(weights.sizes))]
        drop = keep_at_least(weights, below, groups)
        dropped = Positions.of(weights.positions.flat[drop], weights.sizes)
        grown = at_random(weights, _shares(weights, dropped, groups), generator)
        facts = {"threshold": self.threshold}
        # Weights below H that stay, because their layer would be empty or full, count too: if they did not, H would
        # grow without bound in a network that has no free positions.
        self._adapt(int(torch.count_nonzero(below)), sum(weights.counts))
        return Reallocation(dropped, grown, facts)

    def _adapt(self, below: int, active: int) -> None:
        """Halves H if too many weights were below it, doubles it if too few were (Algorithm 1, step 3)."""
        target = self.target if self.target >= 1 else self.target * active
        if below > (1 + self.tolerance) * target:
            self.threshold /= 2
        # If every weight was below H, a higher threshold could not prune more, and H would grow without bound.
        elif below < min((1 - self.tolerance) * target, active):
            self.threshold *= 2

    def state_dict(self) -> dict[str, Any]:
        """Returns the threshold."""
        return {"threshold": self.threshold}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the threshold."""
        self.threshold = float(state["threshold"])


def _shares(weights: ActiveWeights, dropped: Positions, groups: Sequence[Sequence[int]]) -> list[int]:
    """Returns how many weights each layer grows (Algorithm 1, step 4).

    The number of weights that a group pruned is divided in proportion to the survivors R_l of its layers.
    """
    counts = [0] * len(weights.sizes)
    for layers in groups:
        survivors = [weights.counts[i] - dropped.counts[i] for i in layers]
        total = sum(dropped.counts[i] for i in layers)
        for i, count in zip(layers, apportion(total, survivors, [weights.free[i] for i in layers]), strict=True):
            counts[i] = count
    return counts
