"""static: the masks of the start are the masks of the end, the baseline of Mostafa & Wang 2019, section 4."""

from __future__ import annotations

import torch

from dsr_tool.errors import UsageError
from dsr_tool.methods.base import Method, Reallocation
from dsr_tool.sparse.active import ActiveWeights
from dsr_tool.sparsity.granularity import GRANULARITIES

__all__ = ["Static"]


class Static(Method):
    """Never moves a weight."""

    name = "static"
    granularities = GRANULARITIES

    def due(self, step: int) -> bool:  # noqa: ARG002 - the seam's signature
        """Never."""
        return False

    def update(self, weights: ActiveWeights, step: int, generator: torch.Generator) -> Reallocation:  # noqa: ARG002
        """Raise, since it is never due."""
        raise UsageError(f"method {self.name} never reallocates; call update only when due() says so.")
