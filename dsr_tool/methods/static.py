"""static: the masks of the start are the masks of the end, the baseline of Mostafa & Wang 2019, section 4."""

from __future__ import annotations

from typing import Any

import torch

from dsr_tool.errors import UsageError
from dsr_tool.methods.base import Reallocation
from dsr_tool.sparse.active import ActiveWeights

__all__ = ["Static"]


class Static:
    """Never moves a weight."""

    name = "static"

    def due(self, step: int) -> bool:  # noqa: ARG002 - the seam's signature
        """Never."""
        return False

    def update(self, weights: ActiveWeights, generator: torch.Generator) -> Reallocation:  # noqa: ARG002
        """Raise, since it is never due."""
        raise UsageError("method static never reallocates; call update only when due() says so.")

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take."""
