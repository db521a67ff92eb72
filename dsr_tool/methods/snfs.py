"""snfs: sparse networks from scratch, or sparse momentum (Dettmers & Zettlemoyer 2019, section 3)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch

from dsr_tool.errors import UsageError
from dsr_tool.methods.base import Method, Reallocation
from dsr_tool.methods.grow import regrow
from dsr_tool.methods.prune import cosine, smallest
from dsr_tool.methods.schedule import ReallocationSchedule, Timing
from dsr_tool.sparse.active import ActiveWeights
from dsr_tool.sparsity.apportion import apportion

__all__ = ["SNFS"]


class SNFS(Method):
    """Prunes the smallest magnitudes of every layer, and grows where smoothed gradients are largest, across layers.

    A layer grows in proportion to the mean magnitude of the smoothed gradient over its active weights. The authors take
    the momentum of the optimizer, which they keep for inactive weights too. Here it holds none of those, and starts
    anew where a weight grows, so the gradients of all positions are smoothed beside it, at every step. The share that
    is pruned falls with a cosine to zero where the schedule stops.
    """

    name = "snfs"
    summary = "prunes a share of every layer, grows across layers where smoothed gradients are largest"
    needs_gradients = True
    continuous = True  # gradients are smoothed at every step
    bytes_per_weight = 4  # the smoothed gradient of each position, in fp32
    fine_tuning: ClassVar = {"drop_fraction": 0.06}  # as rigl

    def __init__(self, schedule: ReallocationSchedule, *, drop_fraction: float = 0.5, smoothing: float = 0.9) -> None:
        """Sets the method up.

        Args:
            schedule: steps at which to reallocate.
            drop_fraction: share of a layer's active weights to prune at first.
            smoothing: share of the smoothed gradient that stays at each step, as the momentum of SGD.

        Raises:
            UsageError: a fraction is outside its range.
        """
        for name, value, good, allowed in (
            ("--drop-fraction", drop_fraction, 0 < drop_fraction < 1, "(0, 1)"),
            ("smoothing", smoothing, 0 <= smoothing < 1, "[0, 1)"),
        ):
            if not good:
                raise UsageError(f"snfs {name} {value} is not allowed; give a fraction in {allowed}.")
        self.schedule = schedule
        self.drop_fraction, self.smoothing = drop_fraction, smoothing
        self._smoothed: list[torch.Tensor] = []

    @classmethod
    def default_schedule(cls, timing: Timing) -> ReallocationSchedule:
        """Returns 100 updates at equal distances, until the end of the training."""
        return ReallocationSchedule.throughout(**timing)

    def due(self, step: int) -> bool:
        """Returns True until the schedule stops."""
        return 0 < step <= self.schedule.stop

    def update(self, weights: ActiveWeights, step: int, generator: torch.Generator) -> Reallocation:  # noqa: ARG002
        """Smooths the gradients; returns a reallocation at the steps of the schedule, else an empty one.

        Raises:
            UsageError: `weights` has no gradients, or the smoothed ones that were restored are of other layers.
        """
        if weights.gradients is None:
            raise UsageError("snfs needs the gradients of inactive weights; gather them before they are masked.")
        # `load_state_dict` leaves them on the CPU.
        self._smoothed = [each.to(weights.values.device) for each in self._smoothed]
        if not self._smoothed:
            self._smoothed = [torch.zeros_like(gradient) for gradient in weights.gradients]
        if [each.shape for each in self._smoothed] != [gradient.shape for gradient in weights.gradients]:
            raise UsageError(
                "the state of snfs has smoothed gradients of other layers; resume with the layers that were trained "
                "when it was saved."
            )
        for smoothed, gradient in zip(self._smoothed, weights.gradients, strict=True):
            smoothed.lerp_(gradient, 1 - self.smoothing)
        if not self.schedule.due(step):
            return Reallocation.nothing(weights)
        fraction = cosine(self.drop_fraction, step, self.schedule.stop)
        # At least one weight of a layer stays.
        counts = [min(math.ceil(fraction * active), max(active - 1, 0)) for active in weights.counts]
        pieces = zip(self._smoothed, weights.positions.per_layer(), strict=True)
        # NaN is no share; it is also the mean of a layer without active weights.
        means = torch.stack([smoothed[active].abs().mean().nan_to_num() for smoothed, active in pieces])
        shares = means.tolist()
        room = [free + lost for free, lost in zip(weights.free, counts, strict=True)]
        wanted = apportion(sum(counts), shares, room)
        dropped, grown = regrow(weights, smallest(weights, counts), self._smoothed, wanted)
        return Reallocation(dropped, grown, {"drop_fraction": fraction})

    def state_dict(self) -> dict[str, Any]:
        """Returns a copy of the smoothed gradients, which the next step changes in place."""
        return {"smoothed": [each.clone() for each in self._smoothed]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the smoothed gradients."""
        self._smoothed = [each.clone() for each in state["smoothed"]]
