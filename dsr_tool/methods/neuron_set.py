"""neuron-set: SET that also removes hidden units.

After Liu, Mocanu & Pechenizkiy, "On improving deep learning generalization with adaptive sparse connectivity", ICML
2019 workshop on understanding and improving generalization in deep learning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import optim

from dsr_tool.errors import UsageError
from dsr_tool.methods.base import Method, Reallocation
from dsr_tool.methods.grow import at_random
from dsr_tool.methods.prune import smallest
from dsr_tool.methods.schedule import ReallocationSchedule
from dsr_tool.methods.hidden_units import hidden_units
from dsr_tool.sparse.active import ActiveWeights, Positions, segment_counts
from dsr_tool.sparse.keeper import MaskKeeper
from dsr_tool.sparse.model import SparseModel

__all__ = ["NeuronSET"]

_Bools = npt.NDArray[np.bool_]


class NeuronSET(Method):
    """SET that now and then removes the weakest hidden units, with all their weights, for good.

    The strength of a unit is the sum of the absolute weights that read it; those that make it say little where
    normalisation follows. At each removal, units below a share of the mean strength of their layer's living units go.
    Their weights grow anew among living units of the same layers, so that every layer keeps its count; where
    there is no room for them, the stronger of the units stay. Nothing grows onto a removed unit, so that
    `dsr-tool export --compact` takes it out of the network.

    Hidden units are what `hidden_units` finds; all other layers are trained as by SET.
    """

    name = "neuron-set"

    def __init__(
        self,
        schedule: ReallocationSchedule,
        removals: ReallocationSchedule,
        *,
        drop_fraction: float = 0.14,
        unit_threshold: float = 0.5,
    ) -> None:
        """Set the method up.

        Args:
            schedule: when to move weights.
            removals: when to remove units.
            drop_fraction: as for `SET`.
            unit_threshold: units weaker than this share of the mean are removed, in (0, 1).

        Raises:
            UsageError: a fraction outside (0, 1).
        """
        for name, value in (("drop_fraction", drop_fraction), ("unit_threshold", unit_threshold)):
            if not 0 < value < 1:
                raise UsageError(f"neuron-set {name} {value} is not allowed; give a fraction above 0 and below 1.")
        self.schedule = schedule
        self.removals = removals
        self.drop_fraction = drop_fraction
        self.unit_threshold = unit_threshold

    def keep(
        self,
        model: SparseModel,
        optimizer: optim.Optimizer,
        *,
        seed: int,
        before_masking: Callable[[], None] | None,
    ) -> MaskKeeper:
        """Look for hidden units.

        Raises:
            UsageError: there are none, or the model cannot be captured.
        """
        names = model.trained
        self._weights = [model.weights[name] for name in names]
        self._hidden = hidden_units(model, names)
        if not self._hidden:
            raise UsageError(
                "neuron-set finds no hidden units that only sparse layers make and read; train this model with set."
            )
        self._living = [np.ones(hidden.count, np.bool_) for hidden in self._hidden]
        self._refresh()
        return super().keep(model, optimizer, seed=seed, before_masking=before_masking)

    def due(self, step: int) -> bool:
        """Whether to move weights or remove units after this step."""
        return self.schedule.due(step) or self.removals.due(step)

    def update(self, weights: ActiveWeights, step: int, generator: torch.Generator) -> Reallocation:
        """Remove units if it is time, and do as SET does among what lives."""
        if self.removals.due(step):
            for index in range(len(self._hidden)):
                self._remove_from(index, weights.counts)
            self._refresh()
        active = weights.positions.flat
        freed = self._dead[active]
        taken = segment_counts(active[freed], weights.sizes)
        # Positions of removed units are full, as far as growth can tell.
        occupied = self._dead.clone()
        occupied[active] = True
        closed = replace(weights, positions=Positions.of(occupied.nonzero().squeeze(1), weights.sizes))
        living = ActiveWeights(Positions.of(active[~freed], weights.sizes), weights.values[~freed])
        fraction = self.drop_fraction if self.schedule.due(step) else 0.0
        counts = [
            min(round(fraction * count), max(count - 1, 0), free - lost)
            for count, free, lost in zip(living.counts, closed.free, taken, strict=True)
        ]
        drop = freed.clone()
        drop[~freed] = smallest(living, counts)
        grown = at_random(closed, [a + b for a, b in zip(counts, taken, strict=True)], generator)
        removed = sum(int((~living).sum()) for living in self._living)
        return Reallocation(Positions.of(active[drop], weights.sizes), grown, {"removed_units": float(removed)})

    def _remove_from(self, index: int, counts: Sequence[int]) -> None:
        """Remove the weak among the units of one kind, the weakest first, while the rest has room for all weights."""
        before, strength = self._living[index], self._strength(index)
        weak = before & (strength < self.unit_threshold * strength[before].mean())
        order = np.argsort(strength, kind="stable")
        candidates = order[weak[order]]
        # The more are removed the less room there is, so that the most that fit can be bisected.
        fits, fails = 0, len(candidates) + 1
        while fails - fits > 1:
            trial = (fits + fails) // 2
            self._living[index] = _without(before, candidates[:trial])
            fits, fails = (trial, fails) if self._has_room(counts) else (fits, trial)
        self._living[index] = _without(before, candidates[:fits])

    def _strength(self, index: int) -> npt.NDArray[np.float64]:
        """Sum of the absolute weights that read each unit; on the host, where sums have one order."""
        strength = np.zeros(self._hidden[index].count)
        for reader, units in self._hidden[index].readers:
            weight = self._weights[reader].detach()
            columns = weight.abs().transpose(0, 1).flatten(1).sum(1, dtype=torch.float64).cpu().numpy()
            np.add.at(strength, units[units >= 0], columns[units >= 0])
        return strength

    def _lines(self) -> list[tuple[_Bools, _Bools]]:
        """Which rows and columns of each layer belong to no removed unit."""
        shapes = [weight.shape for weight in self._weights]
        lines = [(np.ones(shape[0], np.bool_), np.ones(shape[1], np.bool_)) for shape in shapes]
        for hidden, living in zip(self._hidden, self._living, strict=True):
            lines[hidden.maker][0][:] = living
            for reader, units in hidden.readers:
                lines[reader][1][:] &= living[units] | (units < 0)
        return lines

    def _has_room(self, counts: Sequence[int]) -> bool:
        """Whether every layer's active weights fit into its living rows and columns."""
        return all(
            count <= int(rows.sum()) * int(columns.sum()) * weight[0, 0].numel()
            for (rows, columns), weight, count in zip(self._lines(), self._weights, counts, strict=True)
        )

    def _refresh(self) -> None:
        """Mark every position of the network that belongs to a removed unit."""
        marks = []
        for (rows, columns), weight in zip(self._lines(), self._weights, strict=True):
            alive = torch.from_numpy(np.logical_and.outer(rows, columns)).to(weight.device)
            marks.append(~alive.repeat_interleave(weight[0, 0].numel(), dim=1).reshape(-1))
        self._dead = torch.cat(marks)

    def state_dict(self) -> dict[str, Any]:
        """Which units are left."""
        return {"living": [torch.from_numpy(living) for living in self._living]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        pairs = zip(state["living"], self._living, strict=True)
        self._living = [_as_saved(saved.numpy(), living) for saved, living in pairs]
        self._refresh()


def _without(living: _Bools, units: npt.NDArray[np.int64]) -> _Bools:
    left: _Bools = living.copy()
    left[units] = False
    return left


def _as_saved(saved: _Bools, living: _Bools) -> _Bools:
    if saved.shape != living.shape:
        raise ValueError(f"{len(saved)} hidden units, not {len(living)}")
    return saved
