"""One cell of a comparison: convert, train, export, measure; whatever goes wrong with it stays its own affair."""

from __future__ import annotations

import math
import platform
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from converters.conversion import convert
from converters.loading import load
from dsr_tool.compare.cells import ARCHIVE, Cell, Comparison
from dsr_tool.errors import DsrError, FormatError, first_line
from dsr_tool.measure.memory.process import can_measure, held_bytes, reset_peak
from dsr_tool.recipes.apply import conversion_options, training_arguments
from dsr_tool.recipes.keys import to_parameters
from dsr_tool.report.sources import read
from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparsity.config import installed_versions
from dsr_tool.train import RunFolder, TrainResult, TrainSettings, load_data, train_in_folder
from dsr_tool.train.checkpoint import CHECKPOINT
from exporters.export import export

__all__ = ["attempt"]

_SCHEMA = "dsr-tool/compare-cell/1"


def attempt(cell: Cell, comparison: Comparison, data: str, *, deadline: float = math.inf, light: bool = True) -> None:
    """Run a cell, from where it stopped if it was begun, and note what became of it.

    Args:
        cell: which.
        comparison: where.
        data: for `load_data`.
        deadline: reading of `time.monotonic()` by which to pause, between two epochs.
        light: remove what only resuming needs, and the state of the best epoch, once the cell is complete.
    """
    before = comparison.record(cell.name) or {}
    record = {"schema": _SCHEMA, "cell": cell.name, "recipe": cell.recipe.name, "seed": cell.seed}
    try:
        found = _run(cell, comparison, data, deadline, before)
    except Exception as error:  # noqa: BLE001 - the other cells are to be run whatever happens to this one
        said = str(error) if isinstance(error, DsrError) else f"{type(error).__name__}: {first_line(error)}"
        found = {"status": "failed", "error": said}
    comparison.note(cell.name, {**record, **found, "at": time.time()})
    if light and found["status"] == "complete":
        _lighten(comparison.run(cell.name))


def _run(cell: Cell, comparison: Comparison, data: str, deadline: float, before: Mapping[str, Any]) -> dict[str, Any]:
    _forget_peak()
    run = _folder(comparison.run(cell.name))
    stopped = run.stopped
    model = load(run.path) if stopped else _start(cell, comparison)
    images = load_data(data, model.config)
    given = {**training_arguments(cell.recipe), "seed": cell.seed}
    facts = {
        "model": cell.recipe.name,
        "data": data.partition(":")[0],
        "recipe": cell.recipe.name,
        "cell": cell.name,
    }
    run.files["recipe.toml"] = cell.recipe.to_toml()
    plan, result = train_in_folder(run, model, images, given, facts=facts, quiet=True, deadline=deadline)
    peak = _peak_bytes(plan, before)
    if len(result.epochs) < plan.epochs:
        return {"status": "paused", "epochs": len(result.epochs), "of_epochs": plan.epochs, "peak_memory_bytes": peak}
    model.to("cpu")
    return {
        "status": "complete",
        **_accuracy(result),
        **_sizes(model, run.path / ARCHIVE),
        "train_time_s": round(math.fsum(record.time_s for record in result.epochs), 3),
        "peak_memory_bytes": peak,
        "machine": _machine(plan),
    }


def _folder(path: Path) -> RunFolder:
    """The run of a cell, begun or not; raises `FormatError` with the remedy where it is damaged."""
    try:
        return RunFolder(path, resume=True)
    except FormatError as error:
        raise FormatError(f"{str(error).rstrip('.')}: delete that folder, and the same command begins it.") from error


def _start(cell: Cell, comparison: Comparison) -> SparseModel:
    """The model before training: converted, or that of the run which the recipe starts from."""
    needed = comparison.run(cell.needs) if cell.needs is not None else None
    if needed is not None and "from" in cell.recipe.model:
        return load(needed)
    # A structure has the seed that its run was converted with, and fresh weights one that follows from it.
    options = conversion_options(cell.recipe) | ({"seed": cell.seed} if needed is None else {"structure": needed})
    return convert(**to_parameters(options))


def _accuracy(result: TrainResult) -> dict[str, Any]:
    return {
        "epochs": len(result.epochs),
        "steps": result.last.step,
        "test_accuracy": result.last.test_accuracy,
        "test_loss": result.last.test_loss,
        "best_test_accuracy": result.best.test_accuracy,
        "best_epoch": result.best.epoch,
    }


def _sizes(model: SparseModel, archive: Path) -> dict[str, Any]:
    """Figures of the exported archive, which was run and compared with the model."""
    verification = export(model, archive, force=True)
    footprint = read(archive).footprint
    return {
        "verified": verification.passed,
        "sparsity": footprint.sparsity,
        "model_sparsity": footprint.model_sparsity,
        "nonzeros": footprint.model.active,
        "parameters": footprint.model.parameters,
        "inference_macs": round(footprint.model.sparse_macs),
        "archive_bytes": archive.stat().st_size,
    }


def _forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if can_measure():
        reset_peak()


def _peak_bytes(plan: TrainSettings, before: Mapping[str, Any]) -> int | None:
    """Most memory that training took on a GPU, or that this process held; in whichever call that was."""
    if plan.device == "cuda":
        now = torch.cuda.max_memory_allocated()
    elif can_measure():
        now = held_bytes("VmHWM")
    else:
        return None
    return max(now, int(before.get("peak_memory_bytes") or 0))


def _machine(plan: TrainSettings) -> dict[str, Any]:
    device = torch.cuda.get_device_name() if plan.device == "cuda" else platform.processor() or platform.machine()
    return {"device": plan.device, "name": device, "threads": torch.get_num_threads(), "versions": installed_versions()}


def _lighten(run: Path) -> None:
    (run / CHECKPOINT).unlink(missing_ok=True)
    shutil.rmtree(run / "best", ignore_errors=True)
