"""The final sparsity of the methods that change the density, and of tied: as an option, a path and exact counts."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from dsr_tool.errors import UsageError
from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparsity.budget import Budget

__all__ = ["active_count", "cubic_sparsity", "final_budget", "require_dense"]


def active_count(sparsity: Fraction | float | str, sizes: Sequence[int]) -> int:
    """Returns the number of active weights at a sparsity: the nearest integer, and at least one for each layer.

    Methods are held to this number wherever they declare a sparsity.

    Args:
        sparsity: fraction of zeros, in [0, 1). Decimal digits count as written: 0.9 is exactly 9/10.
        sizes: number of weights per layer.

    Raises:
        UsageError: the sparsity is outside its range.
    """
    return Budget.of_sparsity(str(sparsity)).active_weights(sum(sizes), 0, len(sizes))


def cubic_sparsity(first: Fraction, final: Fraction, step: int, final_step: int) -> Fraction:
    """Returns the sparsity at a step of the curve of gradual pruning (Zhu & Gupta 2017, equation 1).

    Args:
        first: fraction of zeros at step 0.
        final: fraction of zeros from `final_step` on.
        step: optimizer step.
        final_step: step at which the curve ends.
    """
    # Fractions, so that the last pruning gives the budget to the last weight.
    left = 1 - Fraction(min(step, final_step), final_step)
    return final + (first - final) * left**3


def final_budget(method: str, final_sparsity: float | str | None, start: str = "0") -> Budget:
    """Parses the final sparsity of a method.

    Args:
        method: name of the method, for messages.
        final_sparsity: fraction of zeros among the sparse weights at the end, in (0, 1).
        start: sparsity of the model that it starts from, for messages.

    Raises:
        UsageError: it is missing, or outside its range.
    """
    if final_sparsity is None:
        raise UsageError(
            f"{method} needs a final sparsity; give --final-sparsity 0.9, for example, and a model converted with "
            f"--sparsity {start}."
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
