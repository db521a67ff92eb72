"""Checks of a file, a folder or a trained model against a budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

from dsr_tool.errors import CheckFailed, UsageError
from dsr_tool.report.sources import Source
from dsr_tool.sparsity.budget import Budget

if TYPE_CHECKING:
    from dsr_tool.sparse.model import SparseModel
    from exporters.verify.result import Verification

__all__ = ["ARCHIVE", "BudgetCheck", "BudgetDocument", "check_exported", "check_source", "check_trained", "too_large"]

ARCHIVE = "as an archive"
"""Words after the bytes of a folder, whose own files are not counted: they store zeros, an export does not."""


class BudgetDocument(TypedDict):
    """A check as JSON.

    Attributes:
        kind: `parameters`, `bytes` or `macs`.
        unit: unit that the budget was given in, such as `kB`.
        asked: amount that is allowed, in parameters, bytes or multiply-adds.
        found: amount that the model has.
        fraction: `found` / `asked`.
        measured: what was counted, in words.
        fits: whether `found` is at most `asked`.
        line: the check as one line of text.
    """

    kind: str
    unit: str
    asked: int
    found: int
    fraction: float
    measured: str
    fits: bool
    line: str


@dataclass(frozen=True)
class BudgetCheck:
    """A model's amount beside the amount that its budget allows.

    Attributes:
        budget: the allowed parameters, bytes or multiply-adds.
        found: amount that the model has, in the unit of the budget's kind.
        measured: what was counted, in words that follow the number.
    """

    budget: Budget
    found: int
    measured: str

    @property
    def fits(self) -> bool:
        """True if the model is within the budget."""
        return self.found <= self.budget.amount

    @property
    def fraction(self) -> float:
        """Used share of the budget; 0 or 1 for a budget of nothing."""
        # An amount of 0 is a budget that only an empty model meets.
        return self.found / self.budget.amount if self.budget.amount else float(self.found > 0)

    @property
    def line(self) -> str:
        """The check as one line of text."""
        # The excess is exact: rounded, 12,000,010 of 12,000,000 bytes would be 100.0% and still not fit.
        unit = self.budget.kind.replace("macs", "multiply-adds")
        excess = self.found - self.budget.amount
        over = "" if self.fits else f", {excess:,} {unit.removesuffix('s') if excess == 1 else unit} too many"
        return (
            f"budget {self.budget.show()}: {'fits' if self.fits else 'does not fit'}, {self.budget.show(self.found)} "
            f"({self.fraction:.1%}) {self.measured}{over}"
        )

    def to_dict(self) -> BudgetDocument:
        """Returns plain values for JSON."""
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
    """Checks a file or folder.

    Args:
        source: the measured file or folder.
        budget: the allowed amount. Bytes are counted on disk for a file, and for a folder in the archive that it
            exports to; parameters are the active ones of the whole model; multiply-adds are those of active weights for
            one input.
        maker: the `module:callable` that builds the network, for a folder with a network of the user's own.

    Raises:
        UsageError: the multiply-adds are unknown, or the folder's model cannot be captured.
    """
    if budget.kind == "parameters":
        return BudgetCheck(budget, source.footprint.model.active, "active in the whole model")
    if budget.kind == "macs":
        # Without an input shape the model was never traced, and every layer has 0 multiply-adds.
        if not source.footprint.model.dense_macs:
            raise UsageError(
                f"multiply-adds of {str(source.path)!r} are unknown, so a budget of {budget.show()} cannot be checked; "
                f"give a model that was converted with an input shape."
            )
        return BudgetCheck(budget, source.footprint.model.sparse_macs, "with active weights, for one input")
    if not source.path.is_dir():
        return BudgetCheck(budget, source.footprint.file_bytes, "on disk")
    # Here, because both import torch, which the check of a file does without.
    from converters.archive_size import archive_bytes
    from converters.loading import load

    return BudgetCheck(budget, archive_bytes(load(source.path, maker)), ARCHIVE)


def check_exported(model: SparseModel, verification: Verification) -> BudgetCheck | None:
    """Checks an exported archive against its model's budget in bytes; None for other files or without such a budget."""
    # A budget in bytes is one of the archive; the same model takes other sizes in other containers.
    budget = Budget.of_record(model.config.conversion) if verification.kind == "archive" else None
    return None if budget is None else BudgetCheck(budget, verification.file_bytes, "on disk")


def check_trained(model: SparseModel) -> BudgetCheck | None:
    """Checks a trained model against the budget in bytes that it was converted for; None if it has no such budget."""
    from converters.archive_size import archive_bytes

    # Checked again after training: trained values compress less well than the ones that the conversion measured.
    budget = Budget.of_record(model.config.conversion)
    return None if budget is None else BudgetCheck(budget, archive_bytes(model), ARCHIVE)


def too_large(check: BudgetCheck, model: SparseModel, path: object) -> CheckFailed:
    """Returns the error for a trained model whose archive exceeds its budget, with the smallest sparsity that fits.

    Args:
        check: the check that failed, in bytes.
        model: the trained model.
        path: where the model was saved.
    """
    from converters.archive_size import smallest_sparsity

    # Days of training may be lost, so the error names a sparsity that fits instead of asking for a guess.
    sparsity = smallest_sparsity(model, check.budget.amount)
    remedy = (
        "no sparsity of this model is small enough; convert it with a larger budget"
        if sparsity is None
        else f"it fits if its smallest weights are pruned to a sparsity of {sparsity:.4f}, so convert with "
        f"--sparsity {sparsity:.4f} and train again"
    )
    return CheckFailed(
        f"trained model {str(path)!r} is kept but exceeds its budget of {check.budget.show()}: the archive that it "
        f"exports to has {check.found:,} bytes, {check.found - check.budget.amount:,} too many; {remedy}."
    )
