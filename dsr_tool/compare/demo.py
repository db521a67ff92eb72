"""The demo: a ResNet-18 on scikit-learn's digits, trained dense and sparse, pruned and fine-tuned, and exported."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from converters.conversion import convert
from dsr_tool.calibrate.memory import release_freed
from dsr_tool.compare.demo_document import DemoDocument, DemoRun
from dsr_tool.files import new_folder
from dsr_tool.graph.ir import Graph
from dsr_tool.measure.latency import Settings as BenchSettings
from dsr_tool.measure.latency import measure_latency
from dsr_tool.measure.memory.child import warm_torch
from dsr_tool.measure.memory.process import can_measure, held_bytes, reset_peak
from dsr_tool.report.sources import read
from dsr_tool.report.tables import report_text
from dsr_tool.sparse.folder import WEIGHTS
from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparse.trace import trace
from dsr_tool.sparsity.config import ModelConfig
from dsr_tool.train import RunFolder, TrainResult, load_data, train_in_folder
from exporters.export import export

__all__ = ["run_demo"]

# Digits have 8 x 8 pixels and are resized: a ResNet halves its input five times, and 32 leave one pixel at the end.
_DATA, _ARCHITECTURE, _CLASSES, _SHAPE = "digits", "resnet18", 10, (3, 32, 32)
_NETWORK: dict[str, Any] = {"num_classes": _CLASSES, "input_size": _SHAPE[-1]}
_SPARSITY, _TUNING_EPOCHS = 0.9, 2
# `_STOP`: share of the training after which masks stay fixed, so that the last weights that were grown are trained.
_BATCH_SIZE, _LR, _WARMUP_EPOCHS, _STOP = 64, 0.02, 1, 0.75
_ROUNDS = 50
"""Pairs of runs for each latency; fifty of some milliseconds take less than a second."""
_DOCUMENT = "demo.json"


@dataclass(frozen=True)
class _Training:
    """One of the trainings.

    Attributes:
        name: name of its run folder and files.
        sparsity: sparsity of the converted model.
        method: training method.
        tunes: whether it starts from the weights of the dense run, and from random ones otherwise.
        line: what it does, in words.
    """

    name: str
    sparsity: float
    method: str
    line: str
    tunes: bool = False


_TRAININGS = (
    # At sparsity 0 all masks are full, so `static` trains the dense network; one method fewer to explain.
    _Training("dense", 0.0, "static", "trained dense"),
    _Training("tuned-90", _SPARSITY, "dsr", "converted from the dense run, and fine-tuned", tunes=True),
    _Training("static-90", _SPARSITY, "static", "trained from random weights with fixed masks"),
    _Training("dsr-90", _SPARSITY, "dsr", "trained from random weights with DSR"),
)


class _Demo:
    """One call of the demo; it makes one row after the other."""

    def __init__(self, output: Path, part: Path, *, epochs: int, seed: int, quiet: bool) -> None:
        """Opens the data.

        Args:
            output: path of the demo's folder.
            part: the folder until everything is done.
            epochs: epochs of each training from random weights.
            seed: seed of weights, masks and order of images.
            quiet: show no progress.
        """
        self._output, self._part, self._seed, self._quiet = output, part, seed, quiet
        self._data = load_data(_DATA, ModelConfig("torchvision", _ARCHITECTURE, _CLASSES, _SHAPE))
        self._graph: Graph | None = None
        # A demo of one epoch warms up during its first half.
        warmup = min(_WARMUP_EPOCHS, epochs / 2)
        self._from_random = {"epochs": epochs, "lr": _LR, "warmup_epochs": warmup, "stop": _STOP}

    def row(self, training: _Training) -> DemoRun:
        """Converts, trains and exports a model, and returns its row."""
        base = self._held()
        model = self._converted(training)
        # The memory that the conversion freed is none of the training.
        self._held()
        run = RunFolder(self._part / training.name)
        # Trained weights have defaults of their own, such as a lower learning rate.
        own = {"epochs": _TUNING_EPOCHS} if training.tunes else self._from_random
        settings = {"method": training.method, "batch_size": _BATCH_SIZE, "seed": self._seed, **own}
        facts = {"model": _ARCHITECTURE, "data": _DATA}
        used, result = train_in_folder(run, model, self._data, settings, facts=facts, quiet=self._quiet)
        # On a GPU, the memory of this process is not that of the training.
        peak = held_bytes("VmHWM") - base if base is not None and used.device == "cpu" else None
        return self._exported(training, model, result, peak)

    def _converted(self, training: _Training) -> SparseModel:
        """Returns the model before its training."""
        dense = Path(_TRAININGS[0].name) / WEIGHTS
        model = convert(
            _ARCHITECTURE,
            sparsity=training.sparsity,
            weights=str(self._part / dense) if training.tunes else None,
            storage="compact" if training.sparsity else "masked",
            seed=self._seed,
            **_NETWORK,
        )
        if training.tunes:
            # The weights have another path when the demo is done.
            model.config = replace(
                model.config, conversion={**model.config.conversion, "weights": str(self._output / dense)}
            )
        return model

    def _held(self) -> int | None:
        """Gives freed memory back, starts the peak anew, and returns the bytes that this process holds, if known."""
        release_freed()
        if not can_measure():
            return None
        reset_peak()
        return held_bytes("VmRSS")

    def _exported(self, training: _Training, model: SparseModel, result: TrainResult, peak: int | None) -> DemoRun:
        """Writes archive, ONNX file and report of a trained model, times the archive, and returns the row."""
        name = training.name
        model.to("cpu").to_storage("masked")  # exports run on the CPU
        if self._graph is None:
            # All rows have the same graph, since it names the weights and does not hold them.
            self._graph = trace(model.module, _SHAPE)
        archive = export(model, self._part / f"{name}.dsr", graph=self._graph)
        onnx = export(model, self._part / f"{name}.onnx", graph=self._graph)
        # The report names the file by the path that it has when the demo is done.
        source = replace(read(archive.path), path=self._output / f"{name}.dsr")
        (self._part / f"{name}.txt").write_text(report_text(source) + "\n", encoding="utf-8")
        return {
            "name": name,
            "method": training.method,
            "epochs": len(result.epochs),
            "start_accuracy": result.start_accuracy,
            "test_accuracy": result.last.test_accuracy,
            "active_weights": model.active_weights,
            "prunable_weights": model.prunable_weights,
            "sparsity_of_prunable_weights": model.sparsity,
            "sparsity_of_whole_model": model.model_sparsity,
            "dense_fp32_bytes": 4 * model.parameters,
            "archive_bytes": archive.file_bytes,
            "onnx_bytes": onnx.file_bytes,
            "latency": measure_latency(archive.path, BenchSettings(rounds=_ROUNDS)),
            "train_time_s": round(math.fsum(record.time_s for record in result.epochs), 2),
            "train_peak_bytes": peak,
            # An archive counts as verified only if both runtimes could run it.
            "verified": archive.passed and onnx.passed and len(archive.runtimes) == 2,
            "largest_difference": {**archive.runtimes, "onnx file": onnx.largest_difference},
        }


def run_demo(
    output: Path, *, epochs: int, seed: int, force: bool, quiet: bool, notify: Callable[[str], None]
) -> DemoDocument:
    """Trains and exports the models, and returns the results as plain values, schema `dsr-tool/demo/1`.

    Args:
        output: folder of runs, files and `demo.json`; it appears when everything is done.
        epochs: epochs of each training from random weights.
        seed: seed of the random weights, masks and order of images.
        force: replace an existing demo folder.
        quiet: show no progress.
        notify: called with a line before each row.

    Raises:
        FileError: the folder exists without `force`, or cannot be written.
        UsageError: scikit-learn is not installed.
    """
    started = time.monotonic()
    with new_folder(output, marker=_DOCUMENT, force=force) as part:
        warm_torch()
        demo = _Demo(output, part, epochs=epochs, seed=seed, quiet=quiet)
        rows = []
        for training in _TRAININGS:
            notify(f"{training.name}: {_ARCHITECTURE} at sparsity {training.sparsity:g}, {training.line}")
            rows.append(demo.row(training))
        document: DemoDocument = {
            "schema": "dsr-tool/demo/1",
            "output": str(output),
            "architecture": _ARCHITECTURE,
            "data": _DATA,
            "epochs": epochs,
            "batch_size": _BATCH_SIZE,
            "seed": seed,
            "threads": torch.get_num_threads(),
            "time_s": round(time.monotonic() - started, 1),
            "runs": rows,
        }
        (part / _DOCUMENT).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return document
