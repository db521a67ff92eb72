"""The demo: a ResNet-18 on scikit-learn's digits, trained dense, with DSR and with static masks, and exported."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from converters.conversion import convert
from dsr_tool.files import new_folder
from dsr_tool.report.sources import read
from dsr_tool.report.tables import megabytes, plain_table, render, report_text
from dsr_tool.sparse.model import SparseModel
from dsr_tool.train import RunFolder, load_data, train_in_folder
from exporters.export import export
from exporters.verify.result import Verification

__all__ = ["demo_text", "run_demo"]

# Digits have 8 x 8 pixels and are resized: a ResNet halves its input five times, and 32 leave one pixel at the end.
_ARCHITECTURE, _INPUT_SIZE, _SPARSITY = "resnet18", 32, 0.9
# `_STOP`: share of the training after which masks stay fixed, so that the last weights that were grown are trained.
_BATCH_SIZE, _LR, _WARMUP_EPOCHS, _STOP = 64, 0.05, 1, 0.75
_DOCUMENT = "demo.json"


@dataclass(frozen=True)
class _Training:
    """One of the three trainings.

    Attributes:
        name: name of its run folder and files.
        sparsity: sparsity of the converted model.
        method: training method.
    """

    name: str
    sparsity: float
    method: str


class DemoRun(TypedDict):
    """The result of one training.

    Attributes:
        name: name of its run folder and files.
        method: training method.
        test_accuracy: fraction of test images classified correctly after the last epoch.
        active_weights: number of active weights among the prunable ones.
        prunable_weights: number of weights that the masks cover.
        sparsity_of_prunable_weights: fraction of zeros among the prunable weights.
        sparsity_of_whole_model: fraction of zeros among all parameters.
        dense_fp32_bytes: size of all parameters in fp32, zeros included, in bytes.
        archive_bytes: size of the archive in bytes.
        onnx_bytes: size of the ONNX file in bytes.
        verified: whether both files passed, the archive in both runtimes.
        largest_difference: largest absolute difference from PyTorch's outputs, by runtime.
    """

    name: str
    method: str
    test_accuracy: float
    active_weights: int
    prunable_weights: int
    sparsity_of_prunable_weights: float
    sparsity_of_whole_model: float
    dense_fp32_bytes: int
    archive_bytes: int
    onnx_bytes: int
    verified: bool
    largest_difference: dict[str, float]


class DemoDocument(TypedDict):
    """The demo as JSON, schema `dsr-tool/demo/1`.

    Attributes:
        schema: name and version of the schema.
        output: path of the demo's folder.
        architecture: name of the model.
        data: name of the data set.
        epochs: number of epochs of each training.
        seed: seed of weights, masks and order of images.
        time_s: duration of the whole demo in seconds.
        runs: one entry for each training.
    """

    schema: str
    output: str
    architecture: str
    data: str
    epochs: int
    seed: int
    time_s: float
    runs: list[DemoRun]


# At sparsity 0 all masks are full, so `static` trains the dense network; one method fewer to explain in the table.
_TRAININGS = (
    _Training("dense", 0.0, "static"),
    _Training("dsr-90", _SPARSITY, "dsr"),
    _Training("static-90", _SPARSITY, "static"),
)


def run_demo(
    output: Path, *, epochs: int, seed: int, force: bool, quiet: bool, notify: Callable[[str], None]
) -> DemoDocument:
    """Trains and exports the three models, and returns the results as plain values, schema `dsr-tool/demo/1`.

    Args:
        output: folder of runs, files and `demo.json`; it appears when everything is done.
        epochs: epochs of each training.
        seed: seed of the random weights, masks and order of images.
        force: replace an existing demo folder.
        quiet: show no progress.
        notify: called with a line before each training.

    Raises:
        FileError: the folder exists without `force`, or cannot be written.
        UsageError: scikit-learn is not installed.
    """
    started = time.monotonic()
    with new_folder(output, marker=_DOCUMENT, force=force) as part:
        rows = []
        for training in _TRAININGS:
            notify(
                f"{training.name}: {_ARCHITECTURE} at sparsity {training.sparsity:g}, method {training.method}",
            )
            rows.append(_train_and_export(training, part, epochs=epochs, seed=seed, quiet=quiet))
        document: DemoDocument = {
            "schema": "dsr-tool/demo/1",
            "output": str(output),
            "architecture": _ARCHITECTURE,
            "data": "digits",
            "epochs": epochs,
            "seed": seed,
            "time_s": round(time.monotonic() - started, 1),
            "runs": rows,
        }
        (part / _DOCUMENT).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return document


def demo_text(document: DemoDocument) -> str:
    """Returns the results as a table, with what was verified and where the files are."""
    numbers = ("accuracy", "active weights", "of", "dense fp32 MB", "archive MB", "compact ONNX MB", "verified")
    table = plain_table("run", *numbers, numbers=numbers)
    for row in document["runs"]:
        sizes = (megabytes(row[key]) for key in ("dense_fp32_bytes", "archive_bytes", "onnx_bytes"))
        counts = (f"{row['active_weights']:,}", f"{row['prunable_weights']:,}")
        verified = "yes" if row["verified"] else "NO"
        table.add_row(row["name"], f"{row['test_accuracy']:.2%}", *counts, *sizes, verified)
    # The second run is the one with DSR, whose report shows the most.
    first = document["runs"][1]["name"]
    return (
        f"{render(table)}\n"
        f"{document['architecture']} on digits, one image in five held out, {document['epochs']} epochs each, "
        f"{document['time_s']:.0f} s in total\n"
        f"verified against PyTorch: the archive bit for bit, its outputs in the sparse runtime and ONNX Runtime, and "
        f"the outputs of the ONNX file\n"
        f"files and reports: {document['output']}/ (start with {document['output']}/{first}.txt)"
    )


def _train_and_export(training: _Training, folder: Path, *, epochs: int, seed: int, quiet: bool) -> DemoRun:
    """Runs one training, and writes its run folder, archive, ONNX file and report to the folder."""
    model = convert(_ARCHITECTURE, sparsity=training.sparsity, num_classes=10, input_size=_INPUT_SIZE, seed=seed)
    settings = {
        "method": training.method,
        "epochs": epochs,
        "batch_size": _BATCH_SIZE,
        "lr": _LR,
        # A demo of one epoch warms up during its first half.
        "warmup_epochs": min(_WARMUP_EPOCHS, epochs / 2),
        "stop": _STOP,
        "seed": seed,
    }
    run = RunFolder(folder / training.name)
    facts = {"model": _ARCHITECTURE, "data": "digits"}
    _, result = train_in_folder(run, model, load_data("digits", model.config), settings, facts=facts, quiet=quiet)
    model.to("cpu")  # exports run on the CPU
    archive = export(model, folder / f"{training.name}.dsr")
    onnx = export(model, folder / f"{training.name}.onnx")
    report = report_text(read(archive.path))
    (folder / f"{training.name}.txt").write_text(report + "\n", encoding="utf-8")
    return _row(training, model, result.last.test_accuracy, archive, onnx)


def _row(
    training: _Training, model: SparseModel, accuracy: float, archive: Verification, onnx: Verification
) -> DemoRun:
    """Returns the result of one training, with the verifications of its archive and of its ONNX file."""
    return {
        "name": training.name,
        "method": training.method,
        "test_accuracy": accuracy,
        "active_weights": model.active_weights,
        "prunable_weights": model.prunable_weights,
        "sparsity_of_prunable_weights": model.sparsity,
        "sparsity_of_whole_model": model.model_sparsity,
        "dense_fp32_bytes": 4 * model.parameters,
        "archive_bytes": archive.file_bytes,
        "onnx_bytes": onnx.file_bytes,
        # An archive counts as verified only if both runtimes could run it.
        "verified": archive.passed and onnx.passed and len(archive.runtimes) == 2,
        "largest_difference": {**archive.runtimes, "onnx file": onnx.largest_difference},
    }
