"""What a training method is: prune, allocate, grow, and when."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from dsr_tool.sparse.active import ActiveWeights, Positions

__all__ = ["Method", "Reallocation"]


@dataclass(frozen=True)
class Reallocation:
    """What one update moves.

    Attributes:
        dropped: active positions that become inactive.
        grown: inactive positions that become active; as many as were dropped.
        facts: what the method wants in the log, by name (`threshold`).
    """

    dropped: Positions
    grown: Positions
    facts: dict[str, float]


class Method(Protocol):
    """A training method; it sees weights only through their active values and positions."""

    @property
    def name(self) -> str:
        """Name on the command line."""

    def due(self, step: int) -> bool:
        """Whether to update after optimizer step `step`, the first being 1."""

    def update(self, weights: ActiveWeights, generator: torch.Generator) -> Reallocation:
        """Decide what to move; nothing is changed here."""

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart, plain values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
