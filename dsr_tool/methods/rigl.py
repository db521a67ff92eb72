"""rigl: rigging the lottery (Evci et al., ICML 2020, section 3 and Algorithm 1)."""

from __future__ import annotations

from typing import ClassVar

import torch

from dsr_tool.errors import UsageError
from dsr_tool.methods.base import Method, Reallocation
from dsr_tool.methods.blocks import grow_in_blocks
from dsr_tool.methods.grow import regrow
from dsr_tool.methods.prune import cosine, smallest
from dsr_tool.methods.schedule import ReallocationSchedule, Timing
from dsr_tool.sparse.active import ActiveWeights
from dsr_tool.sparse.model import STORAGES

__all__ = ["RigL"]


class RigL(Method):
    """Prunes the smallest magnitudes of every layer and grows where the dense gradient is largest.

    The share that is pruned decays with a cosine to zero at the end of the schedule. A weight that was just pruned may
    have the largest gradient; then it stays, with its value, as in the authors' code. Unlike there, the optimizer takes
    its step on update steps too, and ties between magnitudes are not broken by noise.

    At fan-in it is SRigL (Lasby et al., ICLR 2024, section 3.1) without ablation of neurons: the smallest magnitudes of
    a layer are pruned wherever they are, and every output grows as many weights as it lost. At N:M every group does.
    """

    name = "rigl"
    summary = "prunes a share of every layer, grows where the dense gradient is largest"
    layers_may_change = True
    needs_gradients = True
    granularities = ("weight", "fan-in", "N:M")
    storages = STORAGES
    fine_tuning: ClassVar = {"drop_fraction": 0.06, "stop": 0.5}  # 0.03 on average, as set: the share falls to zero

    def __init__(self, schedule: ReallocationSchedule, *, drop_fraction: float = 0.3) -> None:
        """Sets the method up.

        Args:
            schedule: steps at which to reallocate; the share reaches zero where it stops.
            drop_fraction: share of a layer's active weights to prune at first.

        Raises:
            UsageError: the fraction is outside (0, 1).
        """
        if not 0 < drop_fraction < 1:
            raise UsageError(f"rigl --drop-fraction {drop_fraction} is not allowed; give a fraction in (0, 1).")
        self.schedule = schedule
        self.drop_fraction = drop_fraction

    @classmethod
    def default_schedule(cls, timing: Timing) -> ReallocationSchedule:
        """Returns the paper's schedule for ImageNet (section 4)."""
        return ReallocationSchedule.steady(**timing)

    def due(self, step: int) -> bool:
        """Returns whether the schedule has a reallocation after this step."""
        return self.schedule.due(step)

    def fraction(self, step: int) -> float:
        """Returns the share of a layer's active weights to prune after this step (section 3, f_decay)."""
        return cosine(self.drop_fraction, step, self.schedule.stop)

    def update(self, weights: ActiveWeights, step: int, generator: torch.Generator) -> Reallocation:  # noqa: ARG002
        """Returns one reallocation that leaves the number of active weights of every layer unchanged.

        Raises:
            UsageError: `weights` has no gradients.
        """
        if weights.gradients is None:
            raise UsageError("rigl needs the gradients of inactive weights; gather them before they are masked.")
        fraction = self.fraction(step)
        counts = [int(fraction * active) for active in weights.counts]
        drop = smallest(weights, counts)
        if weights.blocks:
            dropped, grown = grow_in_blocks(weights, drop, weights.gradients, again=True)
        else:
            dropped, grown = regrow(weights, drop, weights.gradients, counts)
        return Reallocation(dropped, grown, {"drop_fraction": fraction})
