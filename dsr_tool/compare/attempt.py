"""Runs one cell of a comparison: converts, trains, exports and measures. An error fails this cell alone."""

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
from dsr_tool.train.datasets import data_name
from exporters.export import export

__all__ = ["attempt"]

_SCHEMA = "dsr-tool/compare-cell/1"


def attempt(cell: Cell, comparison: Comparison, data: str, *, deadline: float = math.inf, light: bool = True) -> None:
    """Runs a cell, resuming it if it has begun, and writes its record.

    Args:
        cell: the cell.
        comparison: its comparison.
        data: data set, as `load_data` takes it.
        deadline: value of `time.monotonic()` from which to pause after an epoch.
        light: whether to delete checkpoint and best epoch of a complete cell.
    """
    before = comparison.record(cell.name) or {}  # of a call that paused
    record = {"schema": _SCHEMA, "cell": cell.name, "recipe": cell.recipe.name, "seed": cell.seed}
    try:
        result = _run(cell, comparison, data, deadline, before)
    except Exception as error:  # noqa: BLE001 - the other cells must run whatever happens to this one
        message = str(error) if isinstance(error, DsrError) else f"{type(error).__name__}: {first_line(error)}"
        result = {"status": "failed", "error": message}
    comparison.write_record(cell.name, {**record, **result, "at": time.time()})
    if light and result["status"] == "complete":
        _delete_checkpoints(comparison.run_folder(cell.name))


def _run(cell: Cell, comparison: Comparison, data: str, deadline: float, before: Mapping[str, Any]) -> dict[str, Any]:
    """Trains a cell until it is complete or the deadline has passed, and returns the fields of its record.

    Args:
        cell: the cell.
        comparison: its comparison.
        data: data set, as `load_data` takes it.
        deadline: value of `time.monotonic()` from which to pause after an epoch.
        before: the record of the call that paused it; empty without one.
    """
    _reset_peak()
    run = _open_run(comparison.run_folder(cell.name))
    model = load(run.path) if run.stopped else _starting_model(cell, comparison)
    images = load_data(data, model.config)
    arguments = {**training_arguments(cell.recipe), "seed": cell.seed}
    facts = {
        "model": cell.recipe.name,
        "data": data_name(data),  # without the path, so that runs on two machines can be compared
        "recipe": cell.recipe.name,
        "cell": cell.name,
    }
    run.files["recipe.toml"] = cell.recipe.to_toml()  # to repeat this cell by itself
    settings, result = train_in_folder(run, model, images, arguments, facts=facts, quiet=True, deadline=deadline)
    peak = _peak_bytes(settings, before)
    if len(result.epochs) < settings.epochs:
        return {
            "status": "paused",
            "epochs": len(result.epochs),
            "of_epochs": settings.epochs,
            "peak_memory_bytes": peak,
        }
    model.to("cpu")  # the export runs there, and a GPU is free for the next cell
    return {
        "status": "complete",
        **_accuracy_figures(result),
        **_archive_figures(model, run.path / ARCHIVE),
        "train_time_s": round(math.fsum(record.time_s for record in result.epochs), 3),
        "peak_memory_bytes": peak,
        "machine": _machine(settings),
    }


def _open_run(path: Path) -> RunFolder:
    """Returns the run folder of a cell, begun or not; raises `FormatError` with the remedy if it is damaged."""
    try:
        return RunFolder(path, resume=True)
    except FormatError as error:
        raise FormatError(f"{str(error).rstrip('.')}, or delete that folder and run the same command again.") from error


def _starting_model(cell: Cell, comparison: Comparison) -> SparseModel:
    """Returns the model before training: converted, or loaded from the run that the recipe starts from."""
    # `from` continues the weights of the other run; `structure` takes its masks alone.
    needed = comparison.run_folder(cell.needs) if cell.needs is not None else None
    if needed is not None and "from" in cell.recipe.model:
        return load(needed)
    # With a structure, masks and weights take their seeds from the run that it comes from.
    options = conversion_options(cell.recipe) | ({"seed": cell.seed} if needed is None else {"structure": needed})
    return convert(**to_parameters(options))


def _accuracy_figures(result: TrainResult) -> dict[str, Any]:
    """Returns the figures of a record that the training gives; tables use the last epoch, not the best one."""
    return {
        "epochs": len(result.epochs),
        "steps": result.last.step,
        "test_accuracy": result.last.test_accuracy,
        "test_loss": result.last.test_loss,
        "best_test_accuracy": result.best.test_accuracy,
        "best_epoch": result.best.epoch,
    }


def _archive_figures(model: SparseModel, archive: Path) -> dict[str, Any]:
    """Exports the model, which verifies the archive, and returns the archive's figures."""
    # `force`: a cell that failed after its export is run again in the same folder.
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


def _reset_peak() -> None:
    """Makes the peak memory of the GPU and of this process start anew."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    # One process runs many cells, and the peak of an earlier one must not count.
    if can_measure():
        reset_peak()


def _peak_bytes(settings: TrainSettings, before: Mapping[str, Any]) -> int | None:
    """Returns the peak memory of training on a GPU, or of this process, over all calls that ran the cell; in bytes."""
    if settings.device == "cuda":
        now = torch.cuda.max_memory_allocated()
    elif can_measure():
        now = held_bytes("VmHWM")
    else:
        return None
    # Resuming may need less than the call before it.
    return max(now, int(before.get("peak_memory_bytes") or 0))


def _machine(settings: TrainSettings) -> dict[str, Any]:
    """Returns device, threads and versions, by which the page groups the runs."""
    # `processor()` is empty on many Linux systems.
    device = torch.cuda.get_device_name() if settings.device == "cuda" else platform.processor() or platform.machine()
    return {
        "device": settings.device,
        "name": device,
        "threads": torch.get_num_threads(),
        "versions": installed_versions(),
    }


def _delete_checkpoints(run: Path) -> None:
    """Deletes the checkpoint, which only resuming needs, and the model of the best epoch, which no table uses."""
    (run / CHECKPOINT).unlink(missing_ok=True)
    shutil.rmtree(run / "best", ignore_errors=True)
