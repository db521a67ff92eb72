"""static: masks that never change, the baseline of Mostafa & Wang (ICML 2019, section 4)."""

from __future__ import annotations

import torch

from dsr_tool.errors import UsageError
from dsr_tool.methods.base import Method, Reallocation
from dsr_tool.sparse.active import ActiveWeights
from dsr_tool.sparse.model import STORAGES
from dsr_tool.sparsity.granularity import GRANULARITIES

__all__ = ["Static"]


class Static(Method):
    """Keeps the masks of the conversion."""

    name = "static"
    summary = "keeps the masks of the conversion"
    layers_may_change = True
    granularities = GRANULARITIES
    storages = STORAGES

    def due(self, step: int) -> bool:  # noqa: ARG002 - the interface has it
        """Returns False."""
        return False

    def update(self, weights: ActiveWeights, step: int, generator: torch.Generator) -> Reallocation:  # noqa: ARG002
        """Raises `UsageError`, since no update is ever due."""
        raise UsageError(f"method {self.name} never reallocates; call update() only if due() returns True.")
