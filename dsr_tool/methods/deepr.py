"""deepr: deep rewiring (Bellec et al., ICLR 2018, Algorithm 1)."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from torch import optim

from dsr_tool.errors import UsageError
from dsr_tool.methods.base import Method, Reallocation
from dsr_tool.methods.grow import anywhere
from dsr_tool.methods.optimizer_state import step_sizes
from dsr_tool.methods.prune import keep_at_least
from dsr_tool.methods.schedule import ReallocationSchedule, Timing
from dsr_tool.sparse.active import ActiveWeights, Positions
from dsr_tool.sparse.keeper import Keeper
from dsr_tool.sparse.model import STORAGES, SparseModel

__all__ = ["DeepR"]


class DeepR(Method):
    """Adds a random walk to every weight, prunes those whose sign flips, and grows as many anywhere in the network.

    In the paper one step size eta serves the gradient, the pull towards zero and the noise. Here it is that of the
    optimizer: after its step, every active weight moves by Gaussian noise of standard deviation
    sqrt(2 * eta * temperature), where eta is the learning rate divided by 1 - momentum. The pull is the L1 term of the
    training (`TrainSettings.l1`), so the optimizer takes it together with the gradient. A connection has a fixed sign.
    It is drawn at random when the connection grows, at zero; connections of the start take the sign of their weight
    after the first step. If a layer would become empty or no position is free, flipped weights stay, at zero.

    The comparison of Mostafa & Wang (2019) adds the noise to the gradient, with a step size of its own, compares a
    weight's sign with that of the step before, and grows in the layer that pruned.
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
        temperature: float | str = 1e-7,
    ) -> None:
        """Sets the method up.

        Args:
            schedule: steps at which to rewire, usually all.
            total_steps: number of optimizer steps of the whole training, of which the phases are fractions.
            temperature: strength of the noise; a number, or a text such as `1e-3 0.25:1e-4 0.5:1e-5` for one that
                changes at fractions of the training.

        Raises:
            UsageError: the temperature is not a number from 0 on, or its phases do not rise from above 0 to below 1.
        """
        phases = _phases(temperature)
        self.schedule = schedule
        self._temperatures = [value for _, value in phases]
        self._starts = [math.floor(part * total_steps) + 1 for part, _ in phases]
        self._step_sizes: Callable[[], Sequence[float]] | None = None
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
        """Makes the method with its default schedule; phases of the temperature are fractions of the whole training."""
        return cls(cls.default_schedule(timing), timing["total_steps"], **options)

    def keep(
        self,
        model: SparseModel,
        optimizer: optim.Optimizer,
        *,
        seed: int,
        before_masking: Callable[[], None] | None,
    ) -> Keeper:
        """Remembers the optimizer, whose step sizes scale the noise.

        Raises:
            UsageError: the optimizer has no step sizes.
        """
        keeper = super().keep(model, optimizer, seed=seed, before_masking=before_masking)
        self._step_sizes = lambda: step_sizes(model, keeper.optimizer, keeper.names)
        try:
            self._step_sizes()
        except UsageError:
            keeper.remove()
            raise
        return keeper

    def due(self, step: int) -> bool:
        """Returns whether the schedule has a rewiring after this step."""
        return self.schedule.due(step)

    def temperature(self, step: int) -> float:
        """Returns the strength of the noise after this step."""
        return self._temperatures[bisect_right(self._starts, step) - 1]

    def update(self, weights: ActiveWeights, step: int, generator: torch.Generator) -> Reallocation:
        """Returns one rewiring, which leaves the number of active weights of the whole network unchanged.

        Raises:
            UsageError: the method is not attached to an optimizer.
        """
        if self._step_sizes is None:
            raise UsageError("deepr takes the step size of an optimizer; call keep() first, as attach() does.")
        temperature = self.temperature(step)
        active = weights.positions.flat
        signs = self._signs_of(weights)
        sign = signs[active].float().mul_(2).sub_(1)  # bool to -1 or 1
        noise = torch.randn(len(sign), device=sign.device, generator=generator)
        for part, eta in zip(noise.split(weights.counts), self._step_sizes(), strict=True):
            part.mul_(math.sqrt(2 * eta * temperature))
        values = noise.add_(weights.values)
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


def _phases(temperature: float | str) -> list[tuple[float, float]]:
    """Returns (fraction of the training, temperature from there on) pairs; raises `UsageError` for any other text."""
    first, *later = str(temperature).split() or [""]
    try:
        pairs = [(0.0, float(first)), *((float(part), float(value)) for part, value in (p.split(":") for p in later))]
    except ValueError:
        pairs = [(0.0, math.nan)]
    parts = [part for part, _ in pairs]
    rising = all(one < other for one, other in pairwise([*parts, 1.0]))
    if not rising or not all(0 <= value < math.inf for _, value in pairs):
        raise UsageError(
            f"deepr temperature {temperature!r} is not allowed; give a number from 0 on, or one with later phases at "
            f"rising fractions of the training, as in '1e-3 0.25:1e-4 0.5:1e-5'."
        )
    return pairs
