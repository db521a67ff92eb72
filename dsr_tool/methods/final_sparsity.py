"""The option `final_sparsity` of the methods that start from a dense model: gmp, dst and tied."""

from __future__ import annotations

from dsr_tool.errors import UsageError
from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparsity.budget import Budget

__all__ = ["final_budget", "require_dense"]


def final_budget(method: str, final_sparsity: float | str | None) -> Budget:
    """Parses the final sparsity of a method.

    Args:
        method: name of the method, for messages.
        final_sparsity: fraction of zeros among the sparse weights at the end, in (0, 1).

    Raises:
        UsageError: it is missing, or outside its range.
    """
    if final_sparsity is None:
        raise UsageError(
            f"{method} needs a final sparsity; give --final-sparsity 0.9, for example, and a model converted with "
            f"--sparsity 0."
        )
    try:
        return Budget.of_sparsity(final_sparsity)
    except UsageError as error:
        raise UsageError(f"{method} --final-{error}") from None


def require_dense(method: str, model: SparseModel) -> None:
    """Raises `UsageError` for a model that has inactive weights."""
    if model.active_weights != model.prunable_weights:
        raise UsageError(
            f"{method} starts from a dense model, but this one has {model.active_weights:,} of "
            f"{model.prunable_weights:,} weights; convert it with --sparsity 0."
        )
