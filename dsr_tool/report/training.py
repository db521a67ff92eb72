"""The result of a training, as a document and as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict

from dsr_tool.report.budget import BudgetCheck, BudgetDocument
from dsr_tool.sparse.model import SparseModel
from dsr_tool.train import TrainResult, TrainSettings

__all__ = ["TrainingDocument", "training_document", "training_text"]


class LastEpoch(TypedDict):
    """The last epoch of a run: its number from 1, the fraction of test images classified correctly, the mean loss."""

    epoch: int
    test_accuracy: float
    test_loss: float


class BestEpoch(TypedDict):
    """The epoch with the highest test accuracy."""

    epoch: int
    test_accuracy: float


class TrainingDocument(TypedDict):
    """The result of a training as JSON, schema `dsr-tool/train/1`.

    Attributes:
        schema: name and version of the schema.
        run: path of the run folder.
        method: name of the training method.
        recipe: name of the recipe; None without one.
        epochs: number of epochs that were asked for.
        finished: False if `--max-time` ended the run before its last epoch.
        steps: number of optimizer steps.
        settings: settings of the run, with all defaults filled in.
        start_accuracy: fraction of test images classified correctly before the first step; None in runs that were
            started before this was measured.
        time_s: duration of all epochs in seconds, evaluation included.
        last: the last epoch.
        best: the epoch with the highest test accuracy.
        active_weights: number of active weights after training.
        prunable_weights: number of weights that the masks cover.
        parameters: number of all parameters, biases and norms included.
        sparsity: fraction of zeros among the prunable weights.
        model_sparsity: fraction of zeros among all parameters.
        budget: check of the budget in bytes; None if the model has no such budget.
    """

    schema: str
    run: str
    method: str
    recipe: str | None
    epochs: int
    finished: bool
    steps: int
    settings: dict[str, Any]
    start_accuracy: float | None
    time_s: float
    last: LastEpoch
    best: BestEpoch
    active_weights: int
    prunable_weights: int
    parameters: int
    sparsity: float
    model_sparsity: float
    budget: BudgetDocument | None


def training_document(
    run: Path,
    recipe: str | None,
    settings: TrainSettings,
    result: TrainResult,
    model: SparseModel,
    budget: BudgetCheck | None,
) -> TrainingDocument:
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
        "settings": settings.to_dict(),
        "start_accuracy": result.start_accuracy,
        # All calls count: a resumed run keeps the epochs of the call before.
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


def training_text(document: TrainingDocument) -> str:
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
        # An interrupted run prints no result, so only the time limit leads here.
        lines.append(
            f"paused by --max-time after epoch {last['epoch']} of {document['epochs']}; give the same command with "
            f"--resume to continue"
        )
    return "\n".join(lines)
