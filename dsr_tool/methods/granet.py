"""granet: gradual pruning with zero-cost neuroregeneration (Liu et al., NeurIPS 2021, section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, ClassVar

import torch

from dsr_tool.errors import UsageError
from dsr_tool.methods.base import Method, Reallocation
from dsr_tool.methods.final_sparsity import active_count, cubic_sparsity, final_budget
from dsr_tool.methods.grow import regrow
from dsr_tool.methods.prune import cosine, smallest, smallest_of_all
from dsr_tool.methods.schedule import ReallocationSchedule, Timing
from dsr_tool.sparse.active import ActiveWeights, Positions
from dsr_tool.sparse.model import STORAGES

__all__ = ["GraNet"]


class GraNet(Method):
    """Prunes along a cubic curve, and at each update moves a share of every layer to where the gradient is largest.

    It starts from the sparsity of the conversion, dense or half sparse, and ends exactly at the final one. The curve
    prunes the smallest magnitudes of the whole network. Then the smallest of every layer are pruned in addition, and as
    many grow in the same layer by dense gradients, as in RigL; the share falls with a cosine to zero where the schedule
    stops. Moving goes on after the final sparsity is reached.
    """

    name = "granet"
    summary = "prunes along a cubic curve and moves a share of every layer by gradient"
    needs_gradients = True
    storages = STORAGES
    fine_tuning: ClassVar = {"drop_fraction": 0.06}  # as rigl

    def __init__(
        self,
        schedule: ReallocationSchedule,
        total_steps: int,
        *,
        final_sparsity: float | str | None = None,
        drop_fraction: float = 0.5,
        pruned_at: float = 0.5,
    ) -> None:
        """Sets the method up.

        Args:
            schedule: steps at which to update.
            total_steps: number of optimizer steps of the whole training.
            final_sparsity: fraction of zeros among the sparse weights at the end, in (0, 1).
            drop_fraction: share of a layer's active weights to move at first.
            pruned_at: fraction of the training after which the final sparsity is reached.

        Raises:
            UsageError: the final sparsity is missing, a value is outside its range, or no update comes before
                `pruned_at`.
        """
        for name, value, good, allowed in (
            ("--drop-fraction", drop_fraction, 0 < drop_fraction < 1, "(0, 1)"),
            ("pruned-at", pruned_at, 0 < pruned_at <= 1, "(0, 1]"),
        ):
            if not good:
                raise UsageError(f"granet {name} {value} is not allowed; give a fraction in {allowed}.")
        self.schedule = schedule
        self.drop_fraction = drop_fraction
        self.final_sparsity = final_budget(self.name, final_sparsity, "0.5").sparsity
        until = min(schedule.stop, round(pruned_at * total_steps))
        self.final_step = replace(schedule, stop=until).last
        if not self.final_step:
            raise UsageError(f"granet has no update until step {until}; train longer, or lower --every.")
        self._first = Fraction(0)

    @classmethod
    def default_schedule(cls, timing: Timing) -> ReallocationSchedule:
        """Returns 100 updates at equal distances, until the end of the training."""
        return ReallocationSchedule.throughout(**timing)

    @classmethod
    def from_timing(cls, timing: Timing, **options: Any) -> GraNet:
        """Makes the method with its default schedule."""
        return cls(cls.default_schedule(timing), timing["total_steps"], **options)

    def begin(self, sizes: Sequence[int], counts: Sequence[int]) -> None:
        """Takes the sparsity that the curve starts from; raises `UsageError` if it is above the final one."""
        total = active_count(self.sparsity(self.final_step), sizes)
        if total > sum(counts):
            raise UsageError(
                f"granet should end at {total:,} active weights, but the model starts with {sum(counts):,}; convert it "
                f"with a lower --sparsity, such as 0.5."
            )
        self._first = 1 - Fraction(sum(counts), max(sum(sizes), 1))

    def due(self, step: int) -> bool:
        """Returns whether the schedule has an update after this step."""
        return self.schedule.due(step)

    def sparsity(self, step: int) -> Fraction:
        """Returns the fraction of zeros after this step, from that of the start to the final one."""
        return cubic_sparsity(self._first, Fraction(self.final_sparsity or 0), step, self.final_step)

    def update(self, weights: ActiveWeights, step: int, generator: torch.Generator) -> Reallocation:  # noqa: ARG002
        """Returns a pruning to the sparsity of this step, with as many weights moved in every layer.

        Raises:
            UsageError: `weights` has no gradients.
        """
        if weights.gradients is None:
            raise UsageError("granet needs the gradients of inactive weights; gather them before they are masked.")
        sparsity, fraction = self.sparsity(step), cosine(self.drop_fraction, step, self.schedule.stop)
        surplus = max(sum(weights.counts) - active_count(sparsity, weights.sizes), 0)
        gone = Positions.of(weights.positions.flat[smallest_of_all(weights, surplus)], weights.sizes).counts
        moved = [int(fraction * (had - lost)) for had, lost in zip(weights.counts, gone, strict=True)]
        # The curve has pruned the smallest of each layer already.
        drop = smallest(weights, [lost + more for lost, more in zip(gone, moved, strict=True)])
        dropped, grown = regrow(weights, drop, weights.gradients, moved)
        return Reallocation(dropped, grown, {"sparsity": float(sparsity), "drop_fraction": fraction})

    def state_dict(self) -> dict[str, Any]:
        """Returns the sparsity of the start as numerator and denominator."""
        return {"first": [self._first.numerator, self._first.denominator]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the sparsity of the start."""
        self._first = Fraction(*map(int, state["first"]))
