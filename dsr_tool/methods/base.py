"""What a training method is: prune, allocate, grow, and when."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import optim

from dsr_tool.sparse.active import ActiveWeights, Positions
from dsr_tool.sparse.keeper import MaskKeeper
from dsr_tool.sparse.model import SparseModel

__all__ = ["Method", "Reallocation"]


@dataclass(frozen=True)
class Reallocation:
    """What one update moves.

    Attributes:
        dropped: active positions that become inactive.
        grown: inactive positions that become active.
        facts: what the method wants in the log, by name (`threshold`).
        values: new float32 values of all active weights, in the order of `ActiveWeights.values`; they are written
            before anything is dropped. None where the optimizer alone changes values.
    """

    dropped: Positions
    grown: Positions
    facts: dict[str, float] = field(default_factory=dict)
    values: torch.Tensor | None = None

    def in_weights(self, units: Sequence[int]) -> Reallocation:
        """The same, with the positions of all weights in the place of their kernels; see `ActiveWeights.units`."""
        if not units:
            return self
        return replace(self, dropped=self.dropped.weights_of(units), grown=self.grown.weights_of(units))


class Method(ABC):
    """A training method; it sees weights only through their active values and positions.

    Attributes:
        name: name on the command line.
        needs_gradients: whether `update` looks at the gradients of inactive weights.
        continuous: whether it updates after every step, so that logs tell of epochs alone.
        granularities: what it can move: weights, or whole kernels in their place (see `ActiveWeights`).
    """

    name: ClassVar[str]
    needs_gradients: ClassVar[bool] = False
    continuous: ClassVar[bool] = False
    granularities: ClassVar[tuple[str, ...]] = ("weight",)

    def begin(self, sizes: Sequence[int], counts: Sequence[int]) -> None:  # noqa: B027 - most have nothing to say
        """Look at the model before the first step; raise `UsageError` where the method cannot work on it.

        Args:
            sizes: weights per sparse layer.
            counts: active ones among them.
        """

    def keep(
        self,
        model: SparseModel,
        optimizer: optim.Optimizer,
        *,
        seed: int,  # noqa: ARG002 - for methods that draw something for good
        before_masking: Callable[[], None] | None,
    ) -> MaskKeeper:
        """Hook into the optimizer what holds around every step: the masks, unless the method has more to hold.

        Called once, before `begin`; a method that needs more than sizes and counts looks at the model here.

        Args:
            model: the sparse model, already on its device.
            optimizer: made from its parameters.
            seed: of the run; the same on every rank.
            before_masking: as in `MaskKeeper`.

        Raises:
            UsageError: the method cannot work on this model.
        """
        return MaskKeeper(model, optimizer, before_masking=before_masking)

    @abstractmethod
    def due(self, step: int) -> bool:
        """Whether to update after optimizer step `step`, the first being 1."""

    @abstractmethod
    def update(self, weights: ActiveWeights, step: int, generator: torch.Generator) -> Reallocation:
        """Decide what to move after optimizer step `step`; nothing is changed here."""

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart, plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """The inverse of `state_dict`."""
