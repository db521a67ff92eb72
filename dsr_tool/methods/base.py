"""The interface of a training method: which weights to prune, which to grow, and after which optimizer steps."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from importlib.metadata import EntryPoint
from typing import Any, ClassVar

import torch
from torch import optim

from dsr_tool.methods.schedule import ReallocationSchedule, Timing
from dsr_tool.sparse.active import ActiveWeights, Positions
from dsr_tool.sparse.compact.keeper import CompactKeeper
from dsr_tool.sparse.keeper import Keeper
from dsr_tool.sparse.mask_keeper import MaskKeeper
from dsr_tool.sparse.model import SparseModel

__all__ = ["Method", "Reallocation"]


@dataclass(frozen=True)
class Reallocation:
    """The weights that one update prunes and grows.

    Attributes:
        dropped: active positions that become inactive.
        grown: inactive positions that become active.
        facts: figures for the training log by name, such as `threshold`.
        values: new float32 values of all active weights, shape (active,), in the order of `ActiveWeights.values`; they
            are written before anything is pruned. None if the optimizer alone changes values.
    """

    dropped: Positions
    grown: Positions
    facts: dict[str, float] = field(default_factory=dict)
    values: torch.Tensor | None = None

    @classmethod
    def nothing(
        cls, weights: ActiveWeights, facts: dict[str, float] | None = None, values: torch.Tensor | None = None
    ) -> Reallocation:
        """Returns the empty reallocation, after which the same weights are active.

        Args:
            weights: the weights that `update` got.
            facts: as in the class.
            values: as in the class.
        """
        none = Positions(weights.sizes, (0,) * len(weights.sizes), weights.positions.flat[:0])
        return cls(none, none, facts or {}, values)

    def in_weights(self, units: Sequence[int]) -> Reallocation:
        """Replaces positions of kernels by the positions of all their weights; see `ActiveWeights.units`."""
        if not units:
            return self
        return replace(self, dropped=self.dropped.weights_of(units), grown=self.grown.weights_of(units))


class Method(ABC):
    """A training method. It sees weights only through their active values and positions.

    The class is also the method's row in the table of methods: the command line, recipes and the memory report read
    the attributes below and `option_defaults`, and keep no list of their own.

    Attributes:
        name: name on the command line.
        summary: one line of help, without a full stop.
        starts_dense: whether it needs a model converted with sparsity 0.
        needs_gradients: whether `update` reads the gradients of inactive weights; see `wants_gradients`.
        needs_momentum: whether `update` reads the optimizer's momentum of the active weights.
        continuous: whether it updates after every step; the log then has one entry per epoch instead.
        layers_may_change: whether layers may be frozen or unfrozen between two updates; `begin` is then called again.
        granularities: patterns of active weights that it keeps, by kind (`sparsity.granularity.GRANULARITIES`).
        storages: how the sparse weights that it trains can be held (`SparseModel.storage`).
        computes_weights: whether it computes the weights of a pass from others of its own, so that nothing else may.
        bytes_per_weight: bytes held per weight of a sparse layer, on top of weight, gradient, masks and optimizer
            state.
        fine_tuning: defaults for a model that starts from trained weights, where they differ: options, and `stop` of
            the schedule.
        final_sparsity: fraction of zeros among the weights that it trains, from `final_step` on; None for a method that
            keeps the number of active weights. What `sparsity` declares is exact: `final_sparsity.active_count`.
        final_step: optimizer step at which the final sparsity is reached; 0 if the density is constant.
        plugin: entry point that the method was loaded from; None for the methods of this package.
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    starts_dense: ClassVar[bool] = False
    needs_gradients: ClassVar[bool] = False
    needs_momentum: ClassVar[bool] = False
    continuous: ClassVar[bool] = False
    layers_may_change: ClassVar[bool] = False
    granularities: ClassVar[tuple[str, ...]] = ("weight",)
    storages: ClassVar[tuple[str, ...]] = ("masked",)
    computes_weights: ClassVar[bool] = False
    bytes_per_weight: ClassVar[int] = 0
    fine_tuning: ClassVar[Mapping[str, float | str]] = {}
    final_sparsity: Fraction | float | None = None
    final_step: int = 0
    plugin: EntryPoint | None = None

    @classmethod
    def option_defaults(cls) -> dict[str, object]:
        """Returns the default of each option by name: the keyword-only parameters of `__init__`."""
        # Keyword-only, because the positional parameters are schedules, which the user sets by flags of their own.
        parameters = inspect.signature(cls).parameters.values()
        return {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}

    @classmethod
    def default_schedule(cls, timing: Timing) -> ReallocationSchedule | None:  # noqa: ARG003 - most methods read it
        """Returns the schedule of the method's paper, scaled to a training; None for methods without a schedule.

        Args:
            timing: the length of the training, and what the user set of the schedule.

        Raises:
            UsageError: a value of the schedule is not allowed.
        """
        return None

    @classmethod
    def from_timing(cls, timing: Timing, **options: Any) -> Method:
        """Makes the method with its default schedule.

        Args:
            timing: as for `default_schedule`.
            options: the method's own options, by the names of `option_defaults`.

        Raises:
            UsageError: a value is not allowed.
        """
        constructor: Callable[..., Method] = cls  # each method has its own parameters
        schedule = cls.default_schedule(timing)
        return constructor(**options) if schedule is None else constructor(schedule, **options)

    def begin(self, sizes: Sequence[int], counts: Sequence[int]) -> None:  # noqa: B027 - most need no check
        """Checks the model before the first step, and after layers were frozen or unfrozen (`layers_may_change`).

        Args:
            sizes: number of weights per sparse layer.
            counts: number of active weights per sparse layer.

        Raises:
            UsageError: the method cannot train this model.
        """

    def keep(
        self,
        model: SparseModel,
        optimizer: optim.Optimizer,
        *,
        seed: int,  # noqa: ARG002 - for methods that draw random numbers once, such as tied
        before_masking: Callable[[], None] | None,
    ) -> Keeper:
        """Returns what carries out the method's decisions, and keeps inactive weights at zero around every step.

        Called once, before `begin`. Override it to hold more than the masks, or to read more of the model than sizes
        and counts.

        Args:
            model: the sparse model, already on its device.
            optimizer: an optimizer of its parameters.
            seed: seed of the run; the same on every rank.
            before_masking: as in `MaskKeeper`; not None if the method reads gradients of inactive weights.

        Raises:
            UsageError: the method cannot train this model.
        """
        if model.store is not None:
            return CompactKeeper(model, optimizer, model.store, gradients=before_masking is not None)
        return MaskKeeper(model, optimizer, before_masking=before_masking)

    @abstractmethod
    def due(self, step: int) -> bool:
        """Returns whether to update after optimizer step `step`, counted from 1."""

    def sparsity(self, step: int) -> Fraction | float | None:
        """Returns the fraction of zeros after the update at `step`, to which the method is held; None leaves it open.

        Not asked of a method without a final sparsity. By default only the end is declared.
        """
        return self.final_sparsity if step >= self.final_step else None

    def wants_gradients(self, step: int) -> bool:
        """Returns whether the update after `step` reads the gradients of inactive weights, which are copied then.

        Asked only if `needs_gradients`. By default every update does.
        """
        return self.due(step)

    @abstractmethod
    def update(self, weights: ActiveWeights, step: int, generator: torch.Generator) -> Reallocation:
        """Returns what to prune and grow after optimizer step `step`; changes neither weights nor masks."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the state that a resumed run needs: plain values and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 - most have no state
        """Restores what `state_dict` returned."""
