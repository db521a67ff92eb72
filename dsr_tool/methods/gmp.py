"""gmp: gradual magnitude pruning (Zhu & Gupta 2017, "To prune, or not to prune", section 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import ClassVar

import torch

from dsr_tool.errors import UsageError, unknown_name
from dsr_tool.methods.base import Method, Reallocation
from dsr_tool.methods.final_sparsity import active_count, cubic_sparsity, final_budget
from dsr_tool.methods.prune import smallest, smallest_of_all
from dsr_tool.methods.schedule import ReallocationSchedule, Timing
from dsr_tool.sparse.active import ActiveWeights, Positions
from dsr_tool.sparse.model import STORAGES
from dsr_tool.sparsity.apportion import apportion
from dsr_tool.sparsity.distribution import Lamp

__all__ = ["GradualPruning"]

_SCOPES = ("layer", "global", "lamp")
_PRUNINGS = 20
"""Number of prunings of the default schedule."""


class GradualPruning(Method):
    """Prunes the smallest magnitudes in steps, along a cubic curve that ends exactly at the final sparsity.

    By default every layer is pruned to the same sparsity. The model starts dense (sparsity 0), trained or not.
    """

    name = "gmp"
    summary = "prunes the smallest weights of a dense model along a cubic curve, grows nothing"
    starts_dense = True
    layers_may_change = True
    # Trained layers need very different densities, and magnitudes are not comparable between them.
    storages = STORAGES
    fine_tuning: ClassVar = {"scope": "lamp"}

    def __init__(
        self,
        schedule: ReallocationSchedule,
        *,
        final_sparsity: float | str | None = None,
        scope: str = "layer",
        least: int = 1,
    ) -> None:
        """Sets the method up.

        Args:
            schedule: steps at which to prune; at the last one the final sparsity is reached.
            final_sparsity: fraction of zeros among the sparse weights at the end, in (0, 1).
            scope: where magnitudes are compared: within each `layer`, so that all end equally sparse, or in the whole
                network (`global`), which leaves small layers with large weights denser; or in the whole network by
                `lamp` scores, which compare a weight with the larger ones of its layer.
            least: number of weights that every layer keeps, with scope `layer`; a smaller layer keeps all. Mostafa &
                Wang kept 100 of the last layer of LeNet-300-100, where an equal share would be 10.

        Raises:
            UsageError: the final sparsity is missing or outside its range, the scope is unknown, or `least` is below 1
                or needs another scope.
        """
        if scope not in _SCOPES:
            raise unknown_name("gmp --option scope", scope, _SCOPES)
        if not 1 <= least < math.inf or least != int(least):
            raise UsageError(f"gmp least {least} is not allowed; give a whole number from 1 on.")
        if least > 1 and scope != "layer":
            raise UsageError(f"gmp least {least} goes with scope layer, not with {scope}; leave it out.")
        self.schedule = schedule
        self.scope = scope
        self.least = int(least)
        self.budget = final_budget(self.name, final_sparsity)
        self.final_sparsity = self.budget.sparsity
        self.final_step = schedule.last
        if not self.final_step:
            raise UsageError(f"gmp has no step to prune at until step {schedule.stop}; train longer, or lower --every.")

    @classmethod
    def default_schedule(cls, timing: Timing) -> ReallocationSchedule:
        """Returns 20 prunings at equal distances, until 75 % of the training."""
        return ReallocationSchedule.times(_PRUNINGS, **timing)

    def due(self, step: int) -> bool:
        """Returns whether the schedule has a pruning after this step."""
        return self.schedule.due(step)

    def sparsity(self, step: int) -> Fraction:
        """Returns the fraction of zeros after this step, from zero to the final one."""
        return cubic_sparsity(Fraction(0), self.budget.sparsity or Fraction(0), step, self.final_step)

    def begin(self, sizes: Sequence[int], counts: Sequence[int]) -> None:
        """Raises `UsageError` if the model has fewer active weights than it should end with."""
        total = active_count(self.sparsity(self.final_step), sizes)
        if (kept := sum(self._floors(counts))) > total:
            raise UsageError(
                f"gmp should end at {total:,} active weights, but least {self.least} keeps {kept:,}; lower one of them."
            )
        if total > sum(counts):
            raise UsageError(
                f"gmp should end at {total:,} active weights, but the model starts with {sum(counts):,}; convert it "
                f"with --sparsity 0."
            )

    def _floors(self, counts: Sequence[int]) -> list[int]:
        """Returns how many of its active weights each layer keeps at least."""
        return [min(self.least, count) for count in counts]

    def update(self, weights: ActiveWeights, step: int, generator: torch.Generator) -> Reallocation:  # noqa: ARG002
        """Returns a pruning to the sparsity of this step; layers that have fewer weights already stay as they are."""
        sparsity = self.sparsity(step)
        drop = self._smallest(weights, active_count(sparsity, weights.sizes))
        dropped = Positions.of(weights.positions.flat[drop], weights.sizes)
        return replace(Reallocation.nothing(weights, {"sparsity": float(sparsity)}), dropped=dropped)

    def _smallest(self, weights: ActiveWeights, total: int) -> torch.Tensor:
        """Returns a boolean vector over the active weights, True for those to prune until `total` are left."""
        if self.scope == "global":
            return smallest_of_all(weights, max(sum(weights.counts) - total, 0))
        # Shares by size, but no layer gets more than it has: a sparser layer leaves the rest of its share to others.
        if total < sum(weights.counts) and self.scope == "lamp":
            magnitudes = [values.abs().cpu().numpy() for values in weights.values.split(weights.counts)]
            targets = Lamp(magnitudes).counts(total, [min(count, 1) for count in weights.counts])
        elif total < sum(weights.counts):
            targets = apportion(total, weights.sizes, weights.counts, self._floors(weights.counts))
        else:
            targets = list(weights.counts)
        return smallest(weights, [have - want for have, want in zip(weights.counts, targets, strict=True)])
