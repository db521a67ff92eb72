"""What a training method is: prune, allocate, grow, and when."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from dsr_tool.sparse.active import ActiveWeights, Positions

__all__ = ["Method", "Reallocation"]


@dataclass(frozen=True)
class Reallocation:
    """What one update moves.

    Attributes:
        dropped: active positions that become inactive.
        grown: inactive positions that become active.
        facts: what the method wants in the log, by name (`threshold`).
    """

    dropped: Positions
    grown: Positions
    facts: dict[str, float] = field(default_factory=dict)


class Method(ABC):
    """A training method; it sees weights only through their active values and positions.

    Attributes:
        name: name on the command line.
        needs_gradients: whether `update` looks at the gradients of inactive weights.
    """

    name: ClassVar[str]
    needs_gradients: ClassVar[bool] = False

    def begin(self, sizes: Sequence[int], counts: Sequence[int]) -> None:  # noqa: B027 - most have nothing to say
        """Look at the model before the first step; raise `UsageError` where the method cannot work on it.

        Args:
            sizes: weights per sparse layer.
            counts: active ones among them.
        """

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
