"""dense: every weight is active, the baseline that a sparse model is measured against."""

from __future__ import annotations

from collections.abc import Sequence

from dsr_tool.errors import UsageError
from dsr_tool.methods.static import Static

__all__ = ["Dense"]


class Dense(Static):
    """Plain training; it refuses a model with zeros to keep, so that nobody takes a sparse one for a dense one."""

    name = "dense"

    def begin(self, sizes: Sequence[int], counts: Sequence[int]) -> None:
        """Raise `UsageError` when a weight is inactive."""
        if sum(counts) < sum(sizes):
            raise UsageError(
                f"method dense trains all weights, but {sum(sizes) - sum(counts):,} of this model's {sum(sizes):,} are "
                f"inactive; convert it with --sparsity 0 or --thin, or train it with --method static."
            )
