"""dense: all weights are active, the baseline that a sparse model is measured against."""

from __future__ import annotations

from collections.abc import Sequence

from dsr_tool.errors import UsageError
from dsr_tool.methods.static import Static

__all__ = ["Dense"]


class Dense(Static):
    """Trains all weights, and refuses a sparse model, so that nobody mistakes its result for the dense baseline."""

    name = "dense"
    storages = ("masked",)
    summary = "trains all weights of a model without zeros"
    starts_dense = True

    def begin(self, sizes: Sequence[int], counts: Sequence[int]) -> None:
        """Raises `UsageError` if a weight is inactive."""
        if sum(counts) < sum(sizes):
            raise UsageError(
                f"method dense trains all weights, but {sum(sizes) - sum(counts):,} of this model's {sum(sizes):,} are "
                f"inactive; convert it with --sparsity 0 or --thin, or train it with --method static."
            )
