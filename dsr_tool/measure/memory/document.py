"""The memory of running and of training a model: computed, and on request measured beside it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dsr_tool.errors import UsageError, unknown_name
from dsr_tool.files import temporary_folder
from dsr_tool.measure.memory.inference import ComputedRow, computed_inference
from dsr_tool.measure.memory.process import Measured, Request, measure
from dsr_tool.measure.memory.request import MemoryRequest
from dsr_tool.measure.memory.schema import Comparison, MemoryDocument, MethodMemory, RuntimeRow, TrainingStep
from dsr_tool.report.sources import Source
from dsr_tool.runtime.source import Model, ModelInMemory, open_model

if TYPE_CHECKING:
    from dsr_tool.methods import Method
    from dsr_tool.sparse.model import SparseModel

__all__ = ["memory_document"]

_NEEDS_LINUX = "nothing was measured: that needs Linux, whose /proc tells how much memory a process holds"
_NEEDS_MEASURING = "the memory of ONNX Runtime depends on its allocator and is only measured; add --measure"


@dataclass(frozen=True)
class _Files:
    """The files that child processes load for inference.

    Attributes:
        sparse: an archive or ONNX file for the sparse runtime.
        onnx: an ONNX file for ONNX Runtime.
    """

    sparse: Path
    onnx: Path


def memory_document(source: Source, request: MemoryRequest) -> MemoryDocument:
    """Returns the memory as plain values: of inference by runtime and, for a folder, of a training step.

    Raises:
        UsageError: the source has no graph, or a setting is not allowed.
    """
    request.check(source)
    with temporary_folder() as folder:
        if source.is_folder:
            return _folder_document(source, request, folder)
        return _file_document(source, request, folder)


def _file_document(source: Source, request: MemoryRequest, folder: Path) -> MemoryDocument:
    model = open_model(source.path)
    shape = model.graph.inputs[0].shape[1:]
    if None in shape:
        raise UsageError(
            f"--memory needs a fixed input size, but {str(source.path)!r} takes any size; export it with one."
        )
    # ONNX Runtime reads no archives, so one is written as ONNX first.
    onnx = source.path
    if request.measures and source.kind != "onnx":
        onnx = folder / "model.onnx"
        _write_onnx(model, onnx)
    return _inference_document(model, tuple(n or 1 for n in shape), request, _Files(source.path, onnx))


def _write_onnx(model: Model, path: Path) -> None:
    from exporters.onnx.write import to_onnx

    tensors = {name: model.tensor(name) for name in model.graph.parameters}
    path.write_bytes(to_onnx(model.graph, tensors).SerializeToString())


def _folder_document(source: Source, request: MemoryRequest, folder: Path) -> MemoryDocument:
    from converters.loading import load
    from dsr_tool.measure.memory.ledger import OPTIMIZERS
    from dsr_tool.sparse.trace import trace

    if request.optimizer_or_default not in OPTIMIZERS:
        raise unknown_name("--optimizer", request.optimizer_or_default, OPTIMIZERS)
    model = load(source.path, request.maker)
    shape = model.config.input_shape
    if request.input_size and shape:
        shape = (*shape[:1], request.input_size, request.input_size)
    traced = ModelInMemory(source.path, model.config, trace(model.module, shape), model.tensors())
    # The traced graph lives in memory; only a child process needs files, and exporting verifies them, which takes long.
    files = _exported(model, shape, folder) if request.measures else _Files(source.path, source.path)
    document = _inference_document(traced, shape, request, files)
    document["inference"].insert(0, _pytorch_row(model, source, shape, request))
    # A model may run where it cannot train, for example if a norm sees a single value.
    try:
        document["training"] = _training_step(model, source, shape, request)
    except UsageError as error:
        document["training_note"] = str(error)
    try:
        _make_compact(model, source)
        document["training_compact"] = _training_step(model, source, shape, request)
    except UsageError as error:
        document["training_compact_note"] = str(error)
    return document


def _make_compact(model: SparseModel, source: Source) -> None:
    """Puts a model into compact storage.

    Raises:
        UsageError: it has no sparse weight, its method needs masked storage, or compact storage cannot hold it.
    """
    method = _method(source)
    if method and "compact" not in method.storages:
        raise UsageError(f"method {method.name} trains in masked storage.")
    if not model.prunable_weights:
        raise UsageError("the model has no sparse layer.")
    model.to_storage("compact")


def _exported(model: SparseModel, shape: tuple[int, ...], folder: Path) -> _Files:
    """Exports the model for inputs of this shape."""
    from dsr_tool.sparse.model import SparseModel
    from exporters.export import export

    # Archives and ONNX files hold the graph of one input size.
    resized = SparseModel(model.module, model.specs, model.masks, replace(model.config, input_shape=shape))
    files = _Files(folder / "model.dsr", folder / "model.onnx")
    export(resized, files.sparse)
    export(resized, files.onnx)
    return files


def _inference_document(model: Model, shape: tuple[int, ...], request: MemoryRequest, files: _Files) -> MemoryDocument:
    in_order, sparse = computed_inference(model, request.batch, shape)
    note = None if request.measured else _NEEDS_MEASURING
    return {
        "batch": request.batch,
        "input_shape": list(shape),
        "activations": {
            "in_order_bytes": in_order.nbytes,
            "in_order_moment": in_order.moment,
            "fused_bytes": None,
            "fused_moment": None,
        },
        "inference": [
            _row(ComputedRow("ONNX Runtime"), _measured("onnxruntime", files.onnx, shape, request)),
            _row(sparse, _measured("sparse", files.sparse, shape, request)),
        ],
        "training": None,
        "training_note": None,
        "training_compact": None,
        "training_compact_note": None,
        "measurement_note": _NEEDS_LINUX if request.measured and not request.measures else note,
    }


def _pytorch_row(model: SparseModel, source: Source, shape: tuple[int, ...], request: MemoryRequest) -> RuntimeRow:
    from dsr_tool.measure.memory.ledger import inference_ledger

    ledger = inference_ledger(model, request.batch, input_shape=shape)
    weights = ledger.held["weights"]
    row = ComputedRow("PyTorch", weights, ledger.peak_bytes - weights, ledger.moment)
    return _row(row, _measured("pytorch", source.path, shape, request))


def _training_step(model: SparseModel, source: Source, shape: tuple[int, ...], request: MemoryRequest) -> TrainingStep:
    from dsr_tool.measure.memory.ledger import OPTIMIZERS, optimizer_state_bytes, training_ledger

    optimizer = request.optimizer_or_default
    ledger = training_ledger(model, request.batch, input_shape=shape, optimizer=optimizer)
    return {
        "optimizer": optimizer,
        "held_bytes": ledger.held,
        "at_peak_bytes": ledger.at_peak,
        "moment": ledger.moment,
        "optimizer_state_bytes": {name: optimizer_state_bytes(model, name) for name in OPTIMIZERS},
        **_comparison(ledger.peak_bytes, _measured("training", source.path, shape, request, model.storage)),
        "method": _method_memory(source, model.prunable_weights),
    }


def _method_memory(source: Source, weights: int) -> MethodMemory | None:
    """Returns the bytes that the method of a run holds besides the ledger; None if there are none."""
    method = _method(source)
    # The ledger is that of a method of this package that reallocates; a plugin method does not say what it holds.
    if not method or not method.bytes_per_weight:
        return None
    return {"name": method.name, "bytes": method.bytes_per_weight * weights}


def _method(source: Source) -> type[Method] | None:
    """Returns the method of a run; None for a folder without a log, and for a plugin method."""
    from dsr_tool.methods import METHODS

    return METHODS.get(str(source.log.settings["method"])) if source.log else None


def _measured(
    kind: str, path: Path, shape: tuple[int, ...], request: MemoryRequest, storage: str = "masked"
) -> Measured | None:
    if not request.measures:
        return None
    optimizer, maker = request.optimizer_or_default, request.maker
    return measure(Request(kind, str(path), (request.batch, *shape), optimizer, maker, storage=storage))


def _row(row: ComputedRow, measured: Measured | None) -> RuntimeRow:
    computed = None
    if row.weights_bytes is not None and row.activations_bytes is not None:
        computed = row.weights_bytes + row.activations_bytes
    return {
        "runtime": row.runtime,
        "weights_bytes": row.weights_bytes,
        "activations_bytes": row.activations_bytes,
        "moment": row.moment,
        **_comparison(computed, measured),
    }


def _comparison(computed: int | None, measured: Measured | None) -> Comparison:
    if measured is None:
        return {"computed_bytes": computed, "measured_bytes": None, "difference": None, "load_peak_bytes": None}
    return {
        "computed_bytes": computed,
        "measured_bytes": measured.peak_bytes,
        "difference": None if computed is None else computed / max(measured.peak_bytes, 1) - 1,
        "load_peak_bytes": measured.load_peak_bytes,
    }
