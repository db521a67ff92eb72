"""Memory of running and of training a model: computed, and beside it measured."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsr_tool.errors import UsageError, unknown_name
from dsr_tool.graph.ir import Graph
from dsr_tool.measure.memory.inference import Running, folded
from dsr_tool.measure.memory.process import Measured, Request, can_measure, measure
from dsr_tool.report.sources import Source

__all__ = ["Wanted", "memory_document", "wanted_memory"]

_MOST = 100_000  # inputs at once; the arena's pages are followed one by one
_OF_METHOD = {"dst": 4, "tied": 12}
"""Bytes that a method holds besides for each weight of a sparse layer: its dense value; its place, order and sign."""
_NEEDS_LINUX = "nothing was measured: that needs Linux, whose /proc says how much memory a process holds"


@dataclass(frozen=True)
class Wanted:
    """What to compute.

    Attributes:
        batch: inputs at once.
        input_size: side of a square input in place of the model's own; for model folders.
        optimizer: of the training ledger.
        measured: whether to measure each figure in a child process too.
        maker: for a folder with a network of the user's own, the `module:callable` that makes it.
    """

    batch: int = 1
    input_size: int | None = None
    optimizer: str | None = None
    measured: bool = False
    maker: str | None = None

    @property
    def measures(self) -> bool:
        """Whether to measure, and this system can."""
        return self.measured and can_measure()


def wanted_memory(
    asked: bool,
    *,
    batch: int | None,
    input_size: int | None,
    optimizer: str | None,
    measured: bool,
    maker: str | None = None,
) -> Wanted | None:
    """The options of the command line; None where memory was not asked for.

    Raises:
        UsageError: an option that goes with `--memory`, without it.
    """
    if asked:
        return Wanted(1 if batch is None else batch, input_size, optimizer, measured, maker)
    if measured or any(value is not None for value in (batch, input_size, optimizer)):
        raise UsageError("--batch, --input-size, --optimizer and --measure go with --memory; add it.")
    return None


def memory_document(source: Source, wanted: Wanted) -> dict[str, Any]:
    """The memory as plain values: `inference` by runtime and, for a folder, the ledger of `training`.

    Raises:
        UsageError: a source without a graph, or a value that is not allowed.
    """
    if not 1 <= wanted.batch <= _MOST:
        raise UsageError(f"--batch {wanted.batch} is not allowed; give 1 to {_MOST:,} inputs.")
    if wanted.input_size is not None and wanted.input_size < 1:
        raise UsageError(f"--input-size {wanted.input_size} is not allowed; give the side in pixels, 1 or more.")
    if source.kind not in ("model folder", "run folder", "archive", "onnx"):
        raise UsageError(
            f"--memory needs a computation, and {str(source.path)!r} ({source.kind}) holds weights alone; give a model "
            f"folder, .dsr or .onnx file."
        )
    if wanted.optimizer is not None and "folder" not in source.kind:
        raise UsageError("--optimizer goes with a model folder; a file is for inference alone.")
    if wanted.input_size is not None and "folder" not in source.kind:
        raise UsageError("--input-size goes with a model folder; a file takes inputs of the size it was made for.")
    if source.kind == "onnx":
        return _of_onnx(source, wanted)
    return _of_archive(source, wanted) if source.kind == "archive" else _of_folder(source, wanted)


def _of_onnx(source: Source, wanted: Wanted) -> dict[str, Any]:
    from exporters.onnx.graph import graph_of_onnx
    from exporters.onnx.read import read_onnx

    file = read_onnx(source.path)
    graph = graph_of_onnx(file)
    if len(graph.inputs) != 1 or None in graph.inputs[0].shape[1:]:
        raise UsageError("--memory needs a model with one input whose size, but for the batch, is fixed.")
    running = Running(graph, file.array)
    return _document(running, wanted, _shape(graph), {"ONNX Runtime": ("onnxruntime", source.path)})


def _of_archive(source: Source, wanted: Wanted) -> dict[str, Any]:
    from dsr_tool.formats.archive import open_archive

    archive = open_archive(source.path)
    running = folded(archive.graph, source.tensors)
    return _document(running, wanted, _shape(archive.graph), {"scipy runtime": ("scipy", source.path)})


def _of_folder(source: Source, wanted: Wanted) -> dict[str, Any]:
    from converters.conversion import load
    from dsr_tool.measure.memory.ledger import OPTIMIZERS, inference_ledger, optimizer_state_bytes, training_ledger
    from dsr_tool.sparse.trace import trace

    optimizer = wanted.optimizer or "sgd"
    if optimizer not in OPTIMIZERS:
        raise unknown_name("--optimizer", optimizer, OPTIMIZERS)
    model = load(source.path, wanted.maker)
    own = model.config.input_shape
    shape = (*own[:1], wanted.input_size, wanted.input_size) if wanted.input_size and own else own
    running = folded(trace(model.module, shape), model.tensors())
    with tempfile.TemporaryDirectory() as folder:
        files: dict[str, tuple[str, Path]] = {}
        if wanted.measures:
            files = _exported(model, shape, Path(folder))
        document = _document(running, wanted, shape, files)
        torch_run = inference_ledger(model, wanted.batch, input_shape=shape)
        measured = _measured("pytorch", source.path, wanted, shape)
        weights = torch_run.held["weights"]
        document["inference"].insert(
            0, _row("PyTorch", weights, torch_run.peak_bytes - weights, torch_run.moment, measured)
        )
    try:
        ledger = training_ledger(model, wanted.batch, input_shape=shape, optimizer=optimizer)
    except UsageError as error:
        # Running is possible where training is not, as with norms over a single value.
        return {**document, "training_note": str(error)}
    document["training"] = {
        "optimizer": optimizer,
        "held_bytes": ledger.held,
        "at_peak_bytes": ledger.at_peak,
        "moment": ledger.moment,
        "optimizer_state_bytes": {name: optimizer_state_bytes(model, name) for name in OPTIMIZERS},
        **_beside(ledger.peak_bytes, _measured("training", source.path, wanted, shape)),
        "method": _of_method(source, model.prunable_weights),
    }
    return document


def _of_method(source: Source, weights: int) -> dict[str, Any] | None:
    """What the method of a run holds beside the ledger, which is that of the methods that move weights; or None."""
    method = str(source.log.settings["method"]) if source.log else ""
    return {"name": method, "bytes": _OF_METHOD[method] * weights} if method in _OF_METHOD else None


def _exported(model: Any, shape: tuple[int, ...], folder: Path) -> dict[str, tuple[str, Path]]:
    """The files that are measured, made for inputs of this shape."""
    from dataclasses import replace

    from dsr_tool.sparse.model import SparseModel
    from exporters.export import export

    resized = SparseModel(model.module, model.specs, model.masks, replace(model.config, input_shape=shape))
    export(resized, folder / "model.dsr")
    export(resized, folder / "model.onnx")
    return {
        "ONNX Runtime": ("onnxruntime", folder / "model.onnx"),
        "scipy runtime": ("scipy", folder / "model.dsr"),
    }


def _shape(graph: Graph) -> tuple[int, ...]:
    return tuple(n or 1 for n in graph.inputs[0].shape[1:])


def _document(
    running: Running, wanted: Wanted, shape: tuple[int, ...], files: Mapping[str, tuple[str, Path]]
) -> dict[str, Any]:
    activations, rows = running.computed(wanted.batch, shape)
    return {
        "batch": wanted.batch,
        "input_shape": list(shape),
        "activations": activations,
        "inference": [
            _row(name, *row, _measured(*files[name], wanted, shape) if name in files else None)
            for name, row in rows.items()
        ],
        "training": None,
        "training_note": None,
        "measurement_note": _NEEDS_LINUX if wanted.measured and not can_measure() else None,
    }


def _measured(kind: str, path: Path, wanted: Wanted, shape: tuple[int, ...]) -> Measured | None:
    if not wanted.measures:
        return None
    return measure(Request(kind, str(path), (wanted.batch, *shape), wanted.optimizer or "sgd", wanted.maker))


def _row(name: str, weights: int, activations: int, moment: str, measured: Measured | None) -> dict[str, Any]:
    return {
        "runtime": name,
        "weights_bytes": weights,
        "activations_bytes": activations,
        "moment": moment,
        **_beside(weights + activations, measured),
    }


def _beside(computed: int, measured: Measured | None) -> dict[str, Any]:
    if measured is None:
        return {"computed_bytes": computed, "measured_bytes": None, "difference": None, "load_peak_bytes": None}
    return {
        "computed_bytes": computed,
        "measured_bytes": measured.peak_bytes,
        "difference": computed / max(measured.peak_bytes, 1) - 1,
        "load_peak_bytes": measured.load_peak_bytes,
    }
