"""dsr-tool demo: the main job on a small real data set that comes with a dependency."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsr_tool.cli.common import emit, examples, note, output_options

if TYPE_CHECKING:
    from dsr_tool.sparse.model import SparseModel
    from dsr_tool.train import TrainSettings
    from exporters.verify.result import Verification

__all__ = ["command"]

_ARCH, _INPUT_SIZE, _SPARSITY, _DOCUMENT = "resnet18", 32, 0.9, "demo.json"
_BATCH_SIZE, _LR, _WARMUP_EPOCHS, _STOP = 64, 0.05, 1, 0.75


@dataclass(frozen=True)
class _Run:
    """One of the three trainings: its name, sparsity and method."""

    name: str
    sparsity: float
    method: str


_RUNS = (_Run("dense", 0.0, "static"), _Run("dsr-90", _SPARSITY, "dsr"), _Run("static-90", _SPARSITY, "static"))


@click.command("demo", epilog=examples("dsr-tool demo", "dsr-tool demo -o demo-out --epochs 2 --force"))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=Path("demo-out"), show_default=True, help="A new folder."
)
@click.option("--epochs", type=click.IntRange(min=1), default=12, show_default=True, help="Of each training.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--force", is_flag=True, help="Replace an existing output folder.")
@output_options
def command(output: Path, epochs: int, seed: int, force: bool, as_json: bool, quiet: bool) -> int:
    """Train a ResNet-18 on scikit-learn's digits three times: dense, at 90 % sparsity with DSR, and with static masks.

    Each result is exported as archive and compact ONNX, verified in both runtimes, and listed in one table. Exit code
    3 if a file does not hold its model.
    """
    from dsr_tool.files import new_folder
    from dsr_tool.train import TrainSettings

    started = time.monotonic()
    with new_folder(output, marker=_DOCUMENT, force=force) as part:
        rows = []
        for run in _RUNS:
            note(f"{run.name}: {_ARCH} at sparsity {run.sparsity:g}, method {run.method}", quiet=quiet)
            settings = TrainSettings(
                method=run.method,
                epochs=epochs,
                batch_size=_BATCH_SIZE,
                lr=_LR,
                warmup_epochs=min(_WARMUP_EPOCHS, epochs / 2),
                stop=_STOP,
                seed=seed,
            )
            rows.append(_train_and_export(run, settings, part, quiet=quiet))
        document = {
            "schema": "dsr-tool/demo/1",
            "output": str(output),
            "architecture": _ARCH,
            "data": "digits",
            "epochs": epochs,
            "seed": seed,
            "time_s": round(time.monotonic() - started, 1),
            "runs": rows,
        }
        (part / _DOCUMENT).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    emit(document, _text(document), as_json=as_json)
    return 0 if all(row["verified"] for row in rows) else 3


def _train_and_export(run: _Run, settings: TrainSettings, folder: Path, *, quiet: bool) -> dict[str, Any]:
    from converters.conversion import convert
    from dsr_tool.report.sources import read
    from dsr_tool.report.tables import report_text
    from dsr_tool.train import Progress, RunFolder, load_data, train
    from exporters.export import export

    model = convert(_ARCH, sparsity=run.sparsity, num_classes=10, input_size=_INPUT_SIZE, seed=settings.seed)
    data = load_data("digits", model.config)
    settings = settings.resolve(data.dataset.augment)
    record = RunFolder(folder / run.name)
    record.facts = {"model": _ARCH, "data": "digits", **data.sizes, "settings": settings.to_dict()}
    with record, Progress(settings.epochs, quiet=quiet) as progress:
        result = train(model, data, settings, [record, progress])
    model.to("cpu")
    archive = export(model, folder / f"{run.name}.dsr")
    onnx = export(model, folder / f"{run.name}.onnx")
    (folder / f"{run.name}.txt").write_text(report_text(read(archive.path)) + "\n", encoding="utf-8")
    return _row(run, model, result.last.test_accuracy, archive, onnx)


def _row(run: _Run, model: SparseModel, accuracy: float, archive: Verification, onnx: Verification) -> dict[str, Any]:
    return {
        "name": run.name,
        "method": run.method,
        "test_accuracy": accuracy,
        "active_weights": model.active_weights,
        "prunable_weights": model.prunable_weights,
        "sparsity_of_prunable_weights": model.sparsity,
        "sparsity_of_whole_model": model.model_sparsity,
        "dense_fp32_bytes": 4 * model.parameters,
        "archive_bytes": archive.file_bytes,
        "onnx_bytes": onnx.file_bytes,
        "verified": archive.passed and onnx.passed and len(archive.runtimes) == 2,
        "largest_difference": {**archive.runtimes, "onnx file": onnx.largest_difference},
    }


def _text(document: dict[str, Any]) -> str:
    from dsr_tool.report.tables import megabytes, plain_table, render

    numbers = ("accuracy", "active weights", "of", "dense fp32 MB", "archive MB", "compact ONNX MB", "verified")
    table = plain_table("run", *numbers, numbers=numbers)
    for row in document["runs"]:
        sizes = (megabytes(row[key]) for key in ("dense_fp32_bytes", "archive_bytes", "onnx_bytes"))
        counts = (f"{row['active_weights']:,}", f"{row['prunable_weights']:,}")
        verified = "yes" if row["verified"] else "NO"
        table.add_row(row["name"], f"{row['test_accuracy']:.2%}", *counts, *sizes, verified)
    first = document["runs"][1]["name"]
    return (
        f"{render(table)}\n"
        f"{document['architecture']} on digits, held-out fifth, {document['epochs']} epochs each, "
        f"{document['time_s']:.0f} s in all; verified: the archive bit for bit, its outputs in the sparse runtime and "
        f"in ONNX Runtime, and the ONNX file, all against PyTorch\n"
        f"files and reports: {document['output']}/ (start with {document['output']}/{first}.txt)"
    )
