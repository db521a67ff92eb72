"""dsr: dynamic sparse reparameterization (Mostafa & Wang, ICML 2019, Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from dsr_tool.errors import UsageError
from dsr_tool.methods.base import Method, Reallocation
from dsr_tool.methods.grow import at_random
from dsr_tool.methods.prune import below_threshold, keep_at_least
from dsr_tool.methods.schedule import ReallocationSchedule, Timing
from dsr_tool.sparse.active import ActiveWeights, Positions
from dsr_tool.sparse.model import STORAGES
from dsr_tool.sparsity.apportion import apportion
from dsr_tool.sparsity.granularity import UNSTRUCTURED

__all__ = ["DSR"]


_AUTO = "auto"
"""Value of `threshold` that takes a quantile of the magnitudes."""


class DSR(Method):
    """Prunes below one global threshold, grows across layers in proportion to the survivors, adapts the threshold.

    Beyond the paper, the number of active weights is exact in every case: a layer keeps its largest weight instead of
    becoming empty; the share of a layer that is full goes to the others in proportion; and if the whole network has
    fewer free positions than weights to prune, the largest of these stay.

    At kernel granularity it prunes and grows whole kernels. The magnitude of a kernel is the mean of its weights'. A
    kernel grows only in layers with kernels of the same size, so that the number of weights is exact as well.

    Attributes:
        threshold: the threshold H of the next update; None until the first one chooses it.
    """

    name = "dsr"
    summary = "prunes below one global threshold, grows across layers"
    layers_may_change = True
    granularities = UNSTRUCTURED
    storages = STORAGES
    # Grown weights learn little at a low learning rate, so a short training cannot repair what larger moves undo.
    fine_tuning: ClassVar = {"target": 0.03, "threshold": "auto", "stop": 0.5}

    def __init__(
        self,
        schedule: ReallocationSchedule,
        *,
        target: float = 0.15,
        tolerance: float = 0.1,
        threshold: float | str = 1e-3,
        cross_layer: bool = True,
    ) -> None:
        """Sets the method up.

        Args:
            schedule: steps at which to reallocate.
            target: N_p, the number of weights (or kernels) to prune per update: a number (1 or more) or a fraction of
                the active ones (below 1). The paper's runs at sparsity 0.9 pruned 0.15 to 0.18 of them.
            tolerance: δ, the relative deviation from the target at which the threshold changes.
            threshold: the first threshold H, or `auto` for the `target` quantile of the active magnitudes at the first
                update. A number suits random weights of a known scale; from a smaller one, H doubles at each update
                until it reaches the weights of a trained network.
            cross_layer: whether layers share what was pruned; if not, each grows as many as it pruned.

        Raises:
            UsageError: a value outside its range.
        """
        positive = threshold == _AUTO if isinstance(threshold, str) else 0 < threshold < math.inf
        for name, value, good, allowed in (
            ("target", target, 0 < target < math.inf, "a positive number"),
            ("tolerance", tolerance, 0 <= tolerance < 1, "a fraction in [0, 1)"),
            ("threshold", threshold, positive, f"a positive number, or {_AUTO}"),
        ):
            if not good:
                raise UsageError(f"dsr --{name} {value} is not allowed; give {allowed}.")
        if not isinstance(cross_layer, bool):
            raise UsageError(f"dsr cross-layer {cross_layer!r} is not allowed; give true or false.")
        self.schedule = schedule
        self.target = target
        self.tolerance = tolerance
        self.threshold = None if isinstance(threshold, str) else threshold
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
        if self.threshold is None:
            self.threshold = self._quantile(weights)
        below = below_threshold(weights, self.threshold)
        groups = weights.groups if self.cross_layer else [[i] for i in range(len(weights.sizes))]
        drop = keep_at_least(weights, below, groups)
        dropped = Positions.of(weights.positions.flat[drop], weights.sizes)
        grown = at_random(weights, _shares(weights, dropped, groups), generator)
        active = sum(weights.counts)
        facts = {"threshold": self.threshold, "share": len(dropped.flat) / max(active, 1)}
        # Weights below H that stay, because their layer would be empty or full, count too: if they did not, H would
        # grow without bound in a network that has no free positions.
        self.threshold *= self._factor(int(torch.count_nonzero(below)), active)
        return Reallocation(dropped, grown, facts)

    def _number(self, active: int) -> float:
        """Returns N_p, the number of weights to prune of so many active ones."""
        return self.target if self.target >= 1 else self.target * active

    def _quantile(self, weights: ActiveWeights) -> float:
        """Returns the magnitude that N_p weights are below."""
        magnitude = weights.values.abs()
        # Active zeros did not learn yet. A threshold of 0 could never double.
        magnitude = magnitude[magnitude > 0]
        if not len(magnitude):
            return 1e-3  # of a network of zeros, where any threshold does the same
        rank = min(round(self._number(sum(weights.counts))), len(magnitude) - 1)
        return float(magnitude.kthvalue(rank + 1).values)

    def _factor(self, below: int, active: int) -> float:
        """Returns 1/2 if too many weights were below H, 2 if too few were, or 1 (Algorithm 1, step 3)."""
        target = self._number(active)
        if below > (1 + self.tolerance) * target:
            return 0.5
        # If every weight was below H, a higher threshold could not prune more, and H would grow without bound.
        return 2.0 if below < min((1 - self.tolerance) * target, active) else 1.0

    def state_dict(self) -> dict[str, Any]:
        """Returns the threshold."""
        return {"threshold": self.threshold}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the threshold."""
        self.threshold = None if state["threshold"] is None else float(state["threshold"])


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
