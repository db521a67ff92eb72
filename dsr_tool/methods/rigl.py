"""rigl: rigging the lottery (Evci et al., ICML 2020, section 3 and Algorithm 1)."""

from __future__ import annotations

import math
from itertools import accumulate

import torch

from dsr_tool.errors import UsageError
from dsr_tool.methods.base import Method, Reallocation
from dsr_tool.methods.prune import smallest
from dsr_tool.methods.schedule import ReallocationSchedule
from dsr_tool.sparse.active import ActiveWeights, Positions

__all__ = ["RigL"]


class RigL(Method):
    """Drop the smallest magnitudes of every layer and grow where the dense gradient is largest.

    The fraction decays with a cosine to zero at the end of the schedule. A weight that was just dropped may have the
    largest gradient; then it stays, with its value, as in the authors' code. Unlike there, the optimizer takes its step
    on update steps too, and ties between magnitudes are not broken by noise.
    """

    name = "rigl"
    needs_gradients = True

    def __init__(self, schedule: ReallocationSchedule, *, drop_fraction: float = 0.3) -> None:
        """Set the method up.

        Args:
            schedule: when to reallocate; the fraction reaches zero where it stops.
            drop_fraction: share of a layer's active weights to move at first.

        Raises:
            UsageError: a fraction outside (0, 1).
        """
        if not 0 < drop_fraction < 1:
            raise UsageError(f"rigl --drop-fraction {drop_fraction} is not allowed; give a fraction in (0, 1).")
        self.schedule = schedule
        self.drop_fraction = drop_fraction

    def due(self, step: int) -> bool:
        """Whether the schedule asks for a reallocation after this step."""
        return self.schedule.due(step)

    def fraction(self, step: int) -> float:
        """Share of a layer's active weights to move after this step (section 3, "Drop")."""
        return self.drop_fraction / 2 * (1 + math.cos(math.pi * min(step / max(self.schedule.stop, 1), 1)))

    def update(self, weights: ActiveWeights, step: int, generator: torch.Generator) -> Reallocation:  # noqa: ARG002
        """One reallocation; every layer keeps its count.

        Raises:
            UsageError: `weights` came without gradients.
        """
        if weights.gradients is None:
            raise UsageError("rigl needs the gradients of inactive weights; gather them before they are masked.")
        fraction = self.fraction(step)
        counts = [int(fraction * active) for active in weights.counts]
        drop = smallest(weights, counts)
        grow = torch.zeros(sum(weights.sizes), dtype=torch.bool, device=drop.device)
        starts, bounds = accumulate(weights.sizes, initial=0), accumulate(weights.counts, initial=0)
        for start, bound, active, gradient, count in zip(
            starts, bounds, weights.counts, weights.gradients, counts, strict=False
        ):
            if count:
                segment = slice(bound, bound + active)
                local = weights.positions.flat[segment] - start
                chosen = _largest(gradient, local, drop[segment], count)
                drop[segment] &= ~chosen[local]
                chosen[local] = False
                grow[start : start + len(chosen)] = chosen
        return Reallocation(
            Positions.of(weights.positions.flat[drop], weights.sizes),
            Positions.of(grow.nonzero().squeeze(1), weights.sizes),
            {"drop_fraction": fraction},
        )


def _largest(gradient: torch.Tensor, active: torch.Tensor, drop: torch.Tensor, count: int) -> torch.Tensor:
    """True at the `count` largest magnitudes of a layer's gradient outside the active positions that are not dropped.

    Of equal magnitudes the first positions are taken, as in the authors' code, on every device.
    """
    # A NaN must not cost weights: it is as large as can be, as in a sort.
    score = gradient.abs().nan_to_num_(nan=torch.inf, posinf=torch.inf)
    score[active] = torch.where(drop, score[active], -1.0)
    least = score.topk(count, sorted=False).values.min()
    chosen, ties = score > least, score == least
    return chosen | (ties & (ties.cumsum(0, dtype=torch.int32) <= count - chosen.count_nonzero()))
