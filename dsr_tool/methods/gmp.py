"""gmp: gradual magnitude pruning (Zhu & Gupta 2017, "To prune, or not to prune", section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch

from dsr_tool.errors import UsageError, unknown_name
from dsr_tool.methods.base import Method, Reallocation
from dsr_tool.methods.final_sparsity import final_budget
from dsr_tool.methods.prune import smallest, smallest_of_all
from dsr_tool.methods.schedule import ReallocationSchedule
from dsr_tool.sparse.active import ActiveWeights, Positions
from dsr_tool.sparsity.budget import Budget, apportion

__all__ = ["GradualPruning"]

_SCOPES = ("layer", "global")


class GradualPruning(Method):
    """Remove the smallest magnitudes bit by bit, along a cubic curve that ends exactly at the final sparsity.

    By default every layer is pruned to the same sparsity. The model starts dense (sparsity 0), trained or not.
    """

    name = "gmp"

    def __init__(
        self, schedule: ReallocationSchedule, *, final_sparsity: float | str | None = None, scope: str = "layer"
    ) -> None:
        """Set the method up.

        Args:
            schedule: when to prune; at its last step the final sparsity is reached.
            final_sparsity: fraction of zeros among the sparse weights at the end, in (0, 1).
            scope: where magnitudes are compared: in each `layer`, which all end equally sparse, or in the whole network
                (`global`), which leaves small layers with large weights denser.

        Raises:
            UsageError: no final sparsity, or one outside its range, or an unknown scope.
        """
        if scope not in _SCOPES:
            raise unknown_name("gmp --option scope", scope, _SCOPES)
        self.schedule = schedule
        self.scope = scope
        self.budget = final_budget(self.name, final_sparsity)
        self.last = schedule.last
        if not self.last:
            raise UsageError(f"gmp has no step to prune at until step {schedule.stop}; train longer, or lower --every.")

    def due(self, step: int) -> bool:
        """Whether the schedule asks for pruning after this step."""
        return self.schedule.due(step)

    def sparsity(self, step: int) -> Fraction:
        """Fraction of zeros after this step, from zero to the final one (equation 1)."""
        left = 1 - Fraction(min(step, self.last), self.last)
        return (self.budget.sparsity or Fraction(0)) * (1 - left**3)

    def begin(self, sizes: Sequence[int], counts: Sequence[int]) -> None:
        """Raise `UsageError` when the model has too few active weights already."""
        total = self.budget.active_weights(sum(sizes), 0, len(sizes))
        if total > sum(counts):
            raise UsageError(
                f"gmp should end at {total:,} active weights, but the model has {sum(counts):,} to begin with; convert "
                f"it with --sparsity 0."
            )

    def update(self, weights: ActiveWeights, step: int, generator: torch.Generator) -> Reallocation:  # noqa: ARG002
        """Prune down to what may be active now; where layers have shares, those that have less stay as they are."""
        sparsity = self.sparsity(step)
        total = Budget(sparsity=sparsity).active_weights(sum(weights.sizes), 0, len(weights.sizes))
        drop = self._smallest(weights, total)
        dropped = Positions.of(weights.positions.flat[drop], weights.sizes)
        nothing = Positions(weights.sizes, (0,) * len(weights.sizes), dropped.flat[:0])
        return Reallocation(dropped, nothing, {"sparsity": float(sparsity)})

    def _smallest(self, weights: ActiveWeights, total: int) -> torch.Tensor:
        if self.scope == "global":
            return smallest_of_all(weights, max(sum(weights.counts) - total, 0))
        if total < sum(weights.counts):
            targets = apportion(total, weights.sizes, weights.counts, [1] * len(weights.sizes))
        else:
            targets = list(weights.counts)
        return smallest(weights, [have - want for have, want in zip(weights.counts, targets, strict=True)])
