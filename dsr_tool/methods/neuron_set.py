"""neuron-set: SET that also removes hidden units.

After Liu, Mocanu & Pechenizkiy, "On improving deep learning generalization with adaptive sparse connectivity", ICML
2019 workshop on understanding and improving generalization in deep learning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import optim

from dsr_tool.errors import UsageError
from dsr_tool.methods.base import Method, Reallocation
from dsr_tool.methods.grow import at_random
from dsr_tool.methods.hidden_units import hidden_units
from dsr_tool.methods.prune import drop_counts, smallest
from dsr_tool.methods.schedule import ReallocationSchedule, Timing
from dsr_tool.sparse.active import ActiveWeights, Positions, segment_counts
from dsr_tool.sparse.keeper import Keeper, trained_by
from dsr_tool.sparse.model import STORAGES, SparseModel

__all__ = ["NeuronSET"]

_Bools = npt.NDArray[np.bool_]

_REMOVALS, _LAST_REMOVAL = 10, 0.5
"""Number of removals of the default schedule; fraction of the training at which the last one comes."""


class NeuronSET(Method):
    """SET that also removes the weakest hidden units at a few steps, with all their weights, for good.

    The strength of a unit is the sum of the absolute weights that read it; the weights that compute it mean little if
    normalisation follows. At each removal, units below a share of the mean strength of their layer's living units are
    removed. Their weights grow again among living units of the same layers, so that every layer keeps its count; if
    there is no room for them, the stronger of the units stay. Nothing grows onto a removed unit, so that
    `dsr-tool export --compact` removes it from the network.

    Hidden units are found by `hidden_units`; all other layers are trained as by SET.
    """

    name = "neuron-set"
    summary = "does what set does, and removes weak hidden units"
    bytes_per_weight = 1  # whether each position belongs to a removed unit, as bool
    storages = STORAGES
    fine_tuning: ClassVar = {"drop_fraction": 0.03, "stop": 0.5}  # as set

    def __init__(
        self,
        schedule: ReallocationSchedule,
        removals: ReallocationSchedule,
        *,
        drop_fraction: float = 0.14,
        unit_threshold: float = 0.5,
    ) -> None:
        """Sets the method up.

        Args:
            schedule: steps at which to reallocate weights.
            removals: steps at which to remove units.
            drop_fraction: as for `SET`.
            unit_threshold: share of the mean strength below which a unit is removed, in (0, 1).

        Raises:
            UsageError: a fraction is outside (0, 1).
        """
        for name, value in (("drop_fraction", drop_fraction), ("unit_threshold", unit_threshold)):
            if not 0 < value < 1:
                raise UsageError(f"neuron-set {name} {value} is not allowed; give a fraction above 0 and below 1.")
        self.schedule = schedule
        self.removals = removals
        self.drop_fraction = drop_fraction
        self.unit_threshold = unit_threshold

    @classmethod
    def default_schedule(cls, timing: Timing) -> ReallocationSchedule:
        """Returns the schedule of set, for the reallocations."""
        return ReallocationSchedule.spread(**timing)

    @classmethod
    def from_timing(cls, timing: Timing, **options: Any) -> NeuronSET:
        """Makes the method with the schedule of set, and ten removals in the first half of the training."""
        # An earlier --stop holds for removals too.
        last = min(timing.get("stop", _LAST_REMOVAL), _LAST_REMOVAL)
        removals = ReallocationSchedule.times(_REMOVALS, timing["total_steps"], stop=last)
        return cls(cls.default_schedule(timing), removals, **options)

    def keep(
        self,
        model: SparseModel,
        optimizer: optim.Optimizer,
        *,
        seed: int,
        before_masking: Callable[[], None] | None,
    ) -> Keeper:
        """Finds the hidden units.

        Raises:
            UsageError: there are none, or the model cannot be captured.
        """
        names = trained_by(model, optimizer)
        self._weights = model.weights
        self._names = names
        self._shapes = [model.specs[name].shape for name in names]
        self._device = next(model.module.parameters()).device
        self._hidden = hidden_units(model, names)
        if not self._hidden:
            raise UsageError(
                "neuron-set finds no hidden units that only sparse layers compute and read; train this model with set."
            )
        self._living = [np.ones(hidden.count, np.bool_) for hidden in self._hidden]
        self._mark_dead()
        return super().keep(model, optimizer, seed=seed, before_masking=before_masking)

    def due(self, step: int) -> bool:
        """Returns whether weights are reallocated or units removed after this step."""
        return self.schedule.due(step) or self.removals.due(step)

    def update(self, weights: ActiveWeights, step: int, generator: torch.Generator) -> Reallocation:
        """Removes units if a removal is due; returns a reallocation of SET among the living units."""
        if self.removals.due(step):
            for index in range(len(self._hidden)):
                self._remove_from(index, weights.counts)
            self._mark_dead()
        active = weights.positions.flat
        freed = self._dead[active]
        lost = segment_counts(active[freed], weights.sizes)
        # For growth, all positions of removed units count as active, so that nothing grows there.
        occupied = self._dead.clone()
        occupied[active] = True
        closed = replace(weights, positions=Positions.of(occupied.nonzero().squeeze(1), weights.sizes))
        living = ActiveWeights(Positions.of(active[~freed], weights.sizes), weights.values[~freed])
        # At a step that is due for removal alone, only the weights of removed units are reallocated.
        counts = [0] * len(lost)
        if self.schedule.due(step):
            room = [free - count for free, count in zip(closed.free, lost, strict=True)]
            counts = drop_counts(self.drop_fraction, living.counts, room)
        drop = freed.clone()
        drop[~freed] = smallest(living, counts)
        grown = at_random(closed, [a + b for a, b in zip(counts, lost, strict=True)], generator)
        removed = sum(int((~living).sum()) for living in self._living)
        return Reallocation(Positions.of(active[drop], weights.sizes), grown, {"removed_units": float(removed)})

    def _remove_from(self, index: int, counts: Sequence[int]) -> None:
        """Removes weak units between two layers, the weakest first, while the rest has room for all weights."""
        before, strength = self._living[index], self._strength(index)
        weak = before & (strength < self.unit_threshold * strength[before].mean())
        order = np.argsort(strength, kind="stable")
        candidates = order[weak[order]]
        # The more units are removed the less room is left, so the largest number that fits is found by bisection.
        fits, fails = 0, len(candidates) + 1
        while fails - fits > 1:
            trial = (fits + fails) // 2
            self._living[index] = _without(before, candidates[:trial])
            fits, fails = (trial, fails) if self._has_room(counts) else (fits, trial)
        self._living[index] = _without(before, candidates[:fits])

    def _strength(self, index: int) -> npt.NDArray[np.float64]:
        """Returns the sum of the absolute weights that read each unit, shape (units,)."""
        # Columns of one unit are added on the host, where sums have one order; scattered sums on a GPU have none.
        strength = np.zeros(self._hidden[index].count)
        for reader, units in self._hidden[index].readers:
            weight = self._weights[self._names[reader]].detach()
            columns = weight.abs().transpose(0, 1).flatten(1).sum(1, dtype=torch.float64).cpu().numpy()
            np.add.at(strength, units[units >= 0], columns[units >= 0])
        return strength

    def _living_lines(self) -> list[tuple[_Bools, _Bools]]:
        """Returns for each layer which rows and columns of its weight belong to no removed unit."""
        lines = [(np.ones(shape[0], np.bool_), np.ones(shape[1], np.bool_)) for shape in self._shapes]
        for hidden, living in zip(self._hidden, self._living, strict=True):
            lines[hidden.maker][0][:] = living
            for reader, units in hidden.readers:
                lines[reader][1][:] &= living[units] | (units < 0)
        return lines

    def _has_room(self, counts: Sequence[int]) -> bool:
        """Returns whether every layer's active weights fit into its living rows and columns."""
        return all(
            count <= int(rows.sum()) * int(columns.sum()) * math.prod(shape[2:])
            for (rows, columns), shape, count in zip(self._living_lines(), self._shapes, counts, strict=True)
        )

    def _mark_dead(self) -> None:
        """Computes for every position of the network whether it belongs to a removed unit."""
        marks = []
        for (rows, columns), shape in zip(self._living_lines(), self._shapes, strict=True):
            alive = torch.from_numpy(np.logical_and.outer(rows, columns)).to(self._device)
            marks.append(~alive.repeat_interleave(math.prod(shape[2:]), dim=1).reshape(-1))
        self._dead = torch.cat(marks)

    def state_dict(self) -> dict[str, Any]:
        """Returns which units are left."""
        return {"living": [torch.from_numpy(living) for living in self._living]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores which units are left."""
        pairs = zip(state["living"], self._living, strict=True)
        self._living = [_restored(saved.numpy(), living) for saved, living in pairs]
        self._mark_dead()


def _without(living: _Bools, units: npt.NDArray[np.int64]) -> _Bools:
    left: _Bools = living.copy()
    left[units] = False
    return left


def _restored(saved: _Bools, living: _Bools) -> _Bools:
    if saved.shape != living.shape:
        raise ValueError(f"{len(saved)} hidden units, expected {len(living)}")
    return saved
