"""deepr: deep rewiring (Bellec et al., ICLR 2018, Algorithm 1)."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch

from dsr_tool.errors import UsageError
from dsr_tool.methods.base import Method, Reallocation
from dsr_tool.methods.grow import anywhere
from dsr_tool.methods.prune import keep_at_least
from dsr_tool.methods.schedule import ReallocationSchedule, Timing
from dsr_tool.sparse.active import ActiveWeights, Positions
from dsr_tool.sparse.model import STORAGES

__all__ = ["DeepR"]

_COOLING = ((0.0, 1.0), (0.125, 1e-3), (0.4, 1e-7), (0.7, 1e-10))
"""(fraction of the training, factor on the first temperature from there on), as in the code of Mostafa & Wang."""


class DeepR(Method):
    """Adds a random walk to every weight, prunes those whose sign flips, and grows as many anywhere in the network.

    After each optimizer step, whose learning rate plays no part here, every active weight moves by -eta * l1 towards
    zero and by Gaussian noise of standard deviation sqrt(2 * eta * temperature). A connection has a fixed sign. It is
    drawn at random when the connection grows, at zero; connections of the start take the sign of their weight after
    the first step. If a layer would become empty or no position is free, flipped weights stay, at zero.

    Noise, shrinkage and growth over the whole network are those of the paper. The comparison of Mostafa & Wang (2019)
    adds noise and L1 to the gradient, so that both pass through learning rate and momentum, compares a weight's sign
    with that of the step before, and grows in the layer that pruned. The defaults are theirs for CIFAR-10, as is the
    cooling by 1e-3, 1e-7 and 1e-10 from 12.5, 40 and 70 % of the training on; they used no weight decay.
    """

    name = "deepr"
    summary = "prunes weights whose sign flips in a random walk, grows anywhere"
    continuous = True
    storages = STORAGES
    bytes_per_weight = 1  # the sign of each position, as bool
    fine_tuning: ClassVar = {"stop": 0.5}

    def __init__(
        self,
        schedule: ReallocationSchedule,
        total_steps: int,
        *,
        eta: float = 0.01,
        l1: float = 1e-5,
        temperature: float = 1e-5,
    ) -> None:
        """Sets the method up.

        Args:
            schedule: steps at which to rewire, usually all.
            total_steps: number of optimizer steps of the whole training, over which the temperature falls.
            eta: step size of the random walk.
            l1: strength of the pull towards zero.
            temperature: strength of the noise at first.

        Raises:
            UsageError: a value outside its range.
        """
        for name, value, good, allowed in (
            ("eta", eta, 0 < eta < math.inf, "a positive number"),
            ("l1", l1, 0 <= l1 < math.inf, "0 or more"),
            ("temperature", temperature, 0 <= temperature < math.inf, "0 or more"),
        ):
            if not good:
                raise UsageError(f"deepr {name} {value} is not allowed; give {allowed}.")
        self.schedule = schedule
        self.eta, self.l1, self.first_temperature = eta, l1, temperature
        self._starts = [math.floor(part * total_steps) + 1 for part, _ in _COOLING]
        self._signs: torch.Tensor | None = None

    @classmethod
    def default_schedule(cls, timing: Timing) -> ReallocationSchedule:
        """Returns an update after every step, as in Algorithm 1, until 95 % of the training."""
        return ReallocationSchedule.steady(
            timing["total_steps"],
            every=timing["every"] or 1,
            stop=timing.get("stop", 0.95),
            doubling=timing.get("doubling", ()),
        )

    @classmethod
    def from_timing(cls, timing: Timing, **options: Any) -> DeepR:
        """Makes the method with its default schedule; the temperature falls over the whole training."""
        return cls(cls.default_schedule(timing), timing["total_steps"], **options)

    def due(self, step: int) -> bool:
        """Returns whether the schedule has a rewiring after this step."""
        return self.schedule.due(step)

    def temperature(self, step: int) -> float:
        """Returns the strength of the noise after this step."""
        return self.first_temperature * _COOLING[bisect_right(self._starts, step) - 1][1]

    def update(self, weights: ActiveWeights, step: int, generator: torch.Generator) -> Reallocation:
        """Returns one rewiring, which leaves the number of active weights of the whole network unchanged."""
        temperature = self.temperature(step)
        active = weights.positions.flat
        signs = self._signs_of(weights)
        sign = signs[active].float().mul_(2).sub_(1)  # bool to -1 or 1
        noise = torch.randn(len(sign), device=sign.device, generator=generator)
        values = weights.values.sub(sign, alpha=self.eta * self.l1)
        values.add_(noise, alpha=math.sqrt(2 * self.eta * temperature))
        flipped = values * sign < 0
        dropped = Positions.of(active[flipped], weights.sizes)
        emptied = any(lost == had > 0 for lost, had in zip(dropped.counts, weights.counts, strict=True))
        if emptied or sum(dropped.counts) > sum(weights.free):
            drop = keep_at_least(replace(weights, values=values), flipped, weights.groups)
            dropped = Positions.of(active[drop], weights.sizes)
        # Also those that stay: a weight of the wrong sign is a dormant connection, whose value is zero (section 2).
        values.masked_fill_(flipped, 0.0)
        grown = anywhere(weights, sum(dropped.counts), generator)
        signs[grown.flat] = torch.randint(2, grown.flat.shape, device=sign.device, generator=generator).bool()
        return Reallocation(dropped, grown, {"temperature": temperature}, values)

    def _signs_of(self, weights: ActiveWeights) -> torch.Tensor:
        """Returns a boolean vector over all positions of the network, True for a positive connection."""
        if self._signs is None:
            self._signs = torch.zeros(sum(weights.sizes), dtype=torch.bool, device=weights.values.device)
            self._signs[weights.positions.flat] = weights.values >= 0
        # Signs that load_state_dict restored are on the CPU.
        self._signs = self._signs.to(weights.values.device)
        return self._signs

    def state_dict(self) -> dict[str, Any]:
        """Returns the signs, eight per byte."""
        if self._signs is None:
            return {}
        packed = np.packbits(self._signs.cpu().numpy())
        return {"positions": len(self._signs), "signs": torch.from_numpy(packed)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the signs."""
        self._signs = None
        if state:
            bits = np.unpackbits(state["signs"].cpu().numpy(), count=int(state["positions"]))
            self._signs = torch.from_numpy(bits.astype(np.bool_))
