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
        grown = [weights.positions.flat[:0]]
        starts, bounds = [0, *accumulate(weights.sizes)], [0, *accumulate(weights.counts)]
        for i, count in enumerate(counts):
            if not count:
                continue
            segment = slice(bounds[i], bounds[i + 1])
            local = weights.positions.flat[segment] - starts[i]
            chosen = _largest(weights.gradients[i], local[~drop[segment]], count)
            drop[segment] &= ~chosen[local]
            chosen[local] = False
            grown.append(chosen.nonzero().squeeze(1) + starts[i])
        return Reallocation(
            Positions.of(weights.positions.flat[drop], weights.sizes),
            Positions.of(torch.cat(grown), weights.sizes),
            {"drop_fraction": fraction},
        )


def _largest(gradient: torch.Tensor, kept: torch.Tensor, count: int) -> torch.Tensor:
    """True at the `count` largest magnitudes of a layer's gradient outside the positions that are kept."""
    score = gradient.abs()
    score[kept] = -1
    chosen = torch.zeros_like(score, dtype=torch.bool)
    chosen[score.topk(count, sorted=False).indices] = True
    return chosen
