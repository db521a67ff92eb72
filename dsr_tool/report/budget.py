"""Does a file, a folder or a trained model fit a budget?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsr_tool.errors import CheckFailed, UsageError
from dsr_tool.report.sources import Source
from dsr_tool.sparsity.budget import Budget

if TYPE_CHECKING:
    from dsr_tool.sparse.model import SparseModel
    from exporters.verify.result import Verification

__all__ = ["ARCHIVE", "BudgetCheck", "check_exported", "check_source", "check_trained", "too_large"]

ARCHIVE = "of the archive that it exports to"


@dataclass(frozen=True)
class BudgetCheck:
    """What was found beside what is allowed.

    Attributes:
        budget: what is allowed, in parameters, bytes or multiply-adds.
        found: the same of the model.
        measured: what was counted, in words that follow the number.
    """

    budget: Budget
    found: int
    measured: str

    @property
    def fits(self) -> bool:
        """Whether the budget is met."""
        return self.found <= self.budget.amount

    @property
    def fraction(self) -> float:
        """Part of the budget that is used."""
        return self.found / self.budget.amount if self.budget.amount else float(self.found > 0)

    @property
    def line(self) -> str:
        """One line for a terminal."""
        what = self.budget.kind.replace("macs", "multiply-adds")
        excess = self.found - self.budget.amount
        over = "" if self.fits else f", {excess:,} {what.removesuffix('s') if excess == 1 else what} too many"
        return (
            f"budget {self.budget.show()}: {'fits' if self.fits else 'does not fit'}, {self.budget.show(self.found)} "
            f"({self.fraction:.1%}) {self.measured}{over}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "kind": self.budget.kind,
            "unit": self.budget.unit,
            "asked": self.budget.amount,
            "found": self.found,
            "fraction": self.fraction,
            "measured": self.measured,
            "fits": self.fits,
            "line": self.line,
        }


def check_source(source: Source, budget: Budget, maker: str | None = None) -> BudgetCheck:
    """Check what lies at a path.

    Bytes are those of a file on disk or, for a folder, of the archive that it exports to; parameters are the active
    ones of the whole model, and multiply-adds those of its active weights for one input.

    Args:
        source: what was read there.
        budget: what is allowed.
        maker: for a folder with a network of the user's own, the `module:callable` that makes it.

    Raises:
        UsageError: its multiply-adds are unknown, or the folder's model cannot be captured.
    """
    if budget.kind == "parameters":
        return BudgetCheck(budget, source.footprint.model.active, "active in the whole model")
    if budget.kind == "macs":
        if not source.footprint.model.dense_macs:
            raise UsageError(
                f"multiply-adds of {str(source.path)!r} are unknown, so that a budget of {budget.show()} cannot be "
                f"checked; give a model that was converted with an input shape."
            )
        return BudgetCheck(budget, source.footprint.model.sparse_macs, "with active weights, for one input")
    if not source.path.is_dir():
        return BudgetCheck(budget, source.footprint.file_bytes, "on disk")
    from converters.budgets import archive_bytes
    from converters.conversion import load

    return BudgetCheck(budget, archive_bytes(load(source.path, maker)), ARCHIVE)


def check_exported(model: SparseModel, verification: Verification) -> BudgetCheck | None:
    """Check an archive against the budget in bytes of its model; None for other files, and without such a budget."""
    budget = Budget.of_record(model.config.conversion) if verification.kind == "archive" else None
    return None if budget is None else BudgetCheck(budget, verification.file_bytes, "on disk")


def check_trained(model: SparseModel) -> BudgetCheck | None:
    """Check a model against the budget in bytes that it was converted to; None where it had no such budget."""
    from converters.budgets import archive_bytes

    budget = Budget.of_record(model.config.conversion)
    return None if budget is None else BudgetCheck(budget, archive_bytes(model), ARCHIVE)


def too_large(check: BudgetCheck, model: SparseModel, path: object) -> CheckFailed:
    """The error for a trained model whose archive exceeds its budget, with the smallest sparsity that fits."""
    from converters.budgets import smallest_sparsity

    sparsity = smallest_sparsity(model, check.budget.amount)
    remedy = (
        "no sparsity of this model is small enough; convert it with a larger budget"
        if sparsity is None
        else f"without its smallest weights it fits from a sparsity of {sparsity:.4f} on, so convert with "
        f"--sparsity {sparsity:.4f} and train again"
    )
    return CheckFailed(
        f"trained model {str(path)!r} is kept but exceeds its budget of {check.budget.show()}: the archive that it "
        f"exports to has {check.found:,} bytes, {check.found - check.budget.amount:,} too many; {remedy}."
    )
