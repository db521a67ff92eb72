"""The result of a training, as a document and as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsr_tool.report.budget import BudgetCheck
from dsr_tool.sparse.model import SparseModel
from dsr_tool.train import TrainResult, TrainSettings

__all__ = ["training_document", "training_text"]


def training_document(
    run: Path,
    recipe: str | None,
    settings: TrainSettings,
    result: TrainResult,
    model: SparseModel,
    budget: BudgetCheck | None,
) -> dict[str, Any]:
    """Returns the result as plain values, schema `dsr-tool/train/1`.

    Args:
        run: path of the run folder.
        recipe: name of the recipe; None without one.
        settings: settings of the run.
        result: all epochs of the run.
        model: the trained model.
        budget: the check of its budget in bytes; None if it has no such budget.
    """
    last, best = result.last, result.best
    return {
        "schema": "dsr-tool/train/1",
        "run": str(run),
        "method": settings.method,
        "recipe": recipe,
        "epochs": settings.epochs,
        "finished": last.epoch == settings.epochs,
        "steps": last.step,
        "time_s": round(sum(record.time_s for record in result.epochs), 3),
        "last": {"epoch": last.epoch, "test_accuracy": last.test_accuracy, "test_loss": last.test_loss},
        "best": {"epoch": best.epoch, "test_accuracy": best.test_accuracy},
        "active_weights": model.active_weights,
        "prunable_weights": model.prunable_weights,
        "parameters": model.parameters,
        "sparsity": model.sparsity,
        "model_sparsity": model.model_sparsity,
        "budget": budget.to_dict() if budget else None,
    }


def training_text(document: dict[str, Any]) -> str:
    """Returns accuracy and counts in one line, then the budget, then how to resume a run that is not finished."""
    last, best = document["last"], document["best"]
    lines = [
        f"{document['run']}: test accuracy {last['test_accuracy']:.4f} "
        f"(best {best['test_accuracy']:.4f} in epoch {best['epoch']}), {document['active_weights']:,} active weights "
        f"of {document['prunable_weights']:,} ({document['sparsity']:.2%} zeros), {document['time_s']:.0f} s"
    ]
    if document["budget"]:
        lines.append(document["budget"]["line"])
    if not document["finished"]:
        lines.append(
            f"paused by --max-time after epoch {last['epoch']} of {document['epochs']}; give the same command with "
            f"--resume to continue"
        )
    return "\n".join(lines)
