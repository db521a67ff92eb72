"""Predictions of a file for pictures or arrays, as a document and as text. Never imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypedDict

import numpy as np
import numpy.typing as npt

from dsr_tool.errors import DsrError, FormatError, UsageError, unknown_name
from dsr_tool.files import require_file
from dsr_tool.graph.ir import Value
from dsr_tool.runtime import Session, load_inputs
from dsr_tool.runtime.coverage import CoverageDocument
from dsr_tool.runtime.deploy.session import PlanSession
from dsr_tool.runtime.source import Model, open_model
from dsr_tool.sparsity.tensor import Array
from exporters.containers import container_of

if TYPE_CHECKING:
    from exporters.onnx.session import OnnxSession

__all__ = ["Prediction", "PredictionDocument", "prediction_document", "prediction_text"]

_Runs: TypeAlias = "Session | OnnxSession | PlanSession"
"""Sessions of all kinds, which compute the outputs of a model."""

_RUNTIMES = ("sparse", "scipy", "onnxruntime")
_CHUNK = 16
"""Inputs per call of a session: activations take far more memory than inputs do."""

# Not a class statement, because `class` cannot be the name of an attribute.
_Class = TypedDict("_Class", {"class": int, "label": str})


class _ClassScore(_Class, total=False):
    """A class with one of two scores, in [0, 1].

    Attributes:
        probability: softmax probability, for a classifier.
        pixels: share of all pixels, for a segmentation model.
    """

    probability: float
    pixels: float


class _OutputRange(TypedDict):
    """One of several outputs for one input.

    Attributes:
        name: its name in the file.
        shape: its shape, the batch of one included.
        least, largest: smallest and largest value; None for an output without entries.
    """

    name: str
    shape: list[int]
    least: float | None
    largest: float | None


class _Found(TypedDict, total=False):
    """The results for one input are `top` if the model has one output of scores, and `outputs` for all others.

    Attributes:
        top: classes with the highest scores, in descending order.
        outputs: the raw outputs in their order, such as those of a detector's heads.
    """

    top: list[_ClassScore]
    outputs: list[_OutputRange]


class Prediction(_Found):
    """The prediction for one input; `input` is the path of its file, with an index if the file holds several."""

    input: str


class PredictionDocument(TypedDict):
    """Predictions as JSON, schema `dsr-tool/predict/1`.

    Attributes:
        schema: name and version of the schema.
        file: path of the model.
        runtime: value of `--runtime`.
        fallback: nodes that run on the reference; None if the model does not run on compiled kernels.
        predictions: one entry for each input.
    """

    schema: str
    file: str
    runtime: str
    fallback: CoverageDocument | None
    predictions: list[Prediction]


def prediction_document(
    file: Path,
    inputs: Sequence[Path],
    *,
    runtime: str = "sparse",
    threads: int | None = None,
    top: int = 5,
    labels: Path | None = None,
) -> PredictionDocument:
    """Predicts and returns plain values, schema `dsr-tool/predict/1`.

    Args:
        file: an archive, an ONNX file or a plan.
        inputs: pictures, or .npy arrays of one or several preprocessed inputs.
        runtime: `sparse`, `scipy` or `onnxruntime`.
        threads: worker threads of one call; None for 1, or for every core with onnxruntime.
        top: number of classes to list for each input.
        labels: text file with one class name per line; None for the names in the file.

    Raises:
        UsageError: an argument or an input does not fit the model.
        FileError: a file does not exist.
        FormatError: a file is damaged or of another kind.
        DsrError: the outputs are not finite.
    """
    if runtime not in _RUNTIMES:
        raise unknown_name("--runtime", runtime, _RUNTIMES)
    # Labels and inputs are checked before the session is made, since compiling a model takes longer.
    model = _open(file, inputs, threads)
    names = _class_names(labels, model)
    batches = [load_inputs([path], model.config) for path in inputs]
    session = _session(model, runtime, threads)
    batch = np.concatenate(batches)
    outputs = model.outputs if isinstance(model, PlanSession) else model.graph.outputs
    scores = partial(_scores, names=names, top=top) if _has_scores(outputs) else _ranges
    found = scores(session, batch)
    if found is None:
        raise DsrError(
            f"the outputs of {str(file)!r} contain NaN or inf; check the scale of the inputs and verify the file."
        )
    sources = [name for path, part in zip(inputs, batches, strict=True) for name in _input_names(path, len(part))]
    return {
        "schema": "dsr-tool/predict/1",
        "file": str(file),
        "runtime": runtime,
        "fallback": session.coverage.to_dict() if isinstance(session, Session) and session.coverage else None,
        "predictions": [{"input": source, **one} for source, one in zip(sources, found, strict=True)],
    }


def prediction_text(document: PredictionDocument) -> str:
    """Returns one line per input, with its classes in descending order."""
    lines = []
    for prediction in document["predictions"]:
        if "outputs" in prediction:
            parts, unit = [_range_text(one) for one in prediction["outputs"]], ""
        else:
            parts = [f"{one['label']} {_share(one):.1%}" for one in prediction["top"]]
            unit = " of the pixels" if "pixels" in prediction["top"][0] else ""
        lines.append(f"{prediction['input']}: {', '.join(parts)}{unit}")
    return "\n".join(lines)


def _has_scores(outputs: Sequence[Value]) -> bool:
    """Returns whether a model may be a classifier or a segmentation model: one output with a score for each class."""
    rank = len(outputs[0].shape)
    # A file of another tool need not say what shape its output has.
    return len(outputs) == 1 and (not rank or (rank in (2, 4) and outputs[0].shape[1] != 1))


def _range_text(one: _OutputRange) -> str:
    """Returns an output as its name, its shape unless that is of a scalar, and its range."""
    values = "" if one["least"] is None else f"from {one['least']:.4g} to {one['largest']:.4g}"
    return " ".join(filter(None, (one["name"], "x".join(map(str, one["shape"])), values)))


def _share(score: _ClassScore) -> float:
    """Returns the probability of a class, or its share of the pixels."""
    return score["probability"] if "probability" in score else score["pixels"]


def _scores(session: _Runs, batch: Array, *, names: tuple[str, ...], top: int) -> list[_Found] | None:
    """Returns the classes of each input; None if a score is not finite, whose softmax would be NaN for every class."""
    outputs = np.concatenate([session.run(batch[i : i + _CHUNK]) for i in range(0, len(batch), _CHUNK)])
    if not np.isfinite(outputs).all():
        return None
    # A classifier has one score a class and input; a segmentation model has one a class and pixel.
    return [{"top": (_top_classes if row.ndim == 1 else _pixel_shares)(row, names, top)} for row in outputs]


def _ranges(session: _Runs, batch: Array) -> list[_Found] | None:
    """Returns the ranges of all outputs for each input; None if a value is not finite, which JSON does not have."""
    predictions: list[_Found] = []
    for i in range(len(batch)):
        # One by one: not every output has the batch as its first axis.
        outputs = session.run_all(batch[i : i + 1])
        if not all(np.isfinite(array).all() for array in outputs.values()):
            return None
        predictions.append({"outputs": [_range(name, array) for name, array in outputs.items()]})
    return predictions


def _range(name: str, array: Array) -> _OutputRange:
    least, largest = (float(array.min()), float(array.max())) if array.size else (None, None)
    return {"name": name, "shape": list(array.shape), "least": least, "largest": largest}


def _open(file: Path, inputs: Sequence[Path], threads: int | None) -> Model | PlanSession:
    """Opens the file. Refuses pictures next to an ONNX file, which does not say how pictures become inputs."""
    pictures = [path for path in inputs if path.suffix.lower() != ".npy"]
    container = container_of(file, "FILE")
    says = container.preprocesses
    opened = PlanSession(file, threads or 1) if container.compiles else None
    model = opened or (open_model(file) if says or not pictures else None)
    # An archive that was made of an ONNX file knows no more than that.
    if model is None or (pictures and model.config.source == "onnx"):
        raise UsageError(
            f"{str(file)!r} does not say how to preprocess pictures such as {str(pictures[0])!r}; give .npy arrays, "
            f"or an archive of the model."
        )
    return model


def _class_names(path: Path | None, model: Model | PlanSession) -> tuple[str, ...]:
    """Returns the name of each class, from a text file or, without one, from the model; more names are no error."""
    if path is None:
        return model.config.labels
    require_file(path, "--labels")
    try:
        names = tuple(path.read_text(encoding="utf-8").splitlines())
    except UnicodeDecodeError as error:
        raise FormatError(
            f"--labels {str(path)!r} is not UTF-8 text ({error}); give one class name per line."
        ) from error
    if len(names) < model.config.num_classes:
        raise UsageError(
            f"--labels {str(path)!r} has {len(names)} lines, expected {model.config.num_classes}; give one class name "
            f"per line."
        )
    return names


def _session(model: Model | PlanSession, runtime: str, threads: int | None) -> _Runs:
    """Returns a session of the model on the runtime that the user chose."""
    if isinstance(model, PlanSession):
        if runtime != "sparse":
            raise UsageError(
                f"--runtime {runtime!r} does not run plans, which are programs for the kernels; leave it out, or give "
                f"an archive of the model."
            )
        return model
    if runtime == "onnxruntime":
        # Here, because only this runtime needs onnx and onnxruntime.
        from exporters.onnx.session import OnnxSession
        from exporters.onnx.write import to_onnx

        # Dense weights: ONNX Runtime would decode sparse ones at load, into the same values.
        tensors = {name: model.tensor(name) for name in model.graph.parameters}
        return OnnxSession(to_onnx(model.graph, tensors, encoding="dense").SerializeToString(), threads=threads)
    return Session(model, threads=threads or 1, runtime="scipy" if runtime == "scipy" else "auto")


def _input_names(path: Path, count: int) -> list[str]:
    """Returns a name for each input of a file; an array may hold several."""
    return [str(path)] if count == 1 else [f"{path}[{i}]" for i in range(count)]


def _top_classes(scores: npt.NDArray[np.float32], names: tuple[str, ...], top: int) -> list[_ClassScore]:
    """Returns the classes of highest softmax probability, from scores (classes,)."""
    # Less the maximum, so that no exponential overflows; the quotients are the same.
    exponents = np.exp((scores - scores.max()).astype(np.float64))
    probabilities = exponents / exponents.sum()
    # A stable sort, so that equal scores come in the order of the classes on every machine.
    best = np.argsort(-probabilities, kind="stable")[:top]
    return [{"class": int(i), "label": _label(names, int(i)), "probability": float(probabilities[i])} for i in best]


def _pixel_shares(scores: npt.NDArray[np.float32], names: tuple[str, ...], top: int) -> list[_ClassScore]:
    """Returns the classes with the most pixels and their share of all, from scores (classes, height, width)."""
    counts = np.bincount(scores.argmax(axis=0).ravel(), minlength=len(scores))
    best = [int(i) for i in np.argsort(-counts, kind="stable")[:top] if counts[i]]
    return [{"class": i, "label": _label(names, i), "pixels": float(counts[i] / counts.sum())} for i in best]


def _label(names: tuple[str, ...], index: int) -> str:
    """Returns the name of a class; its index if the model has no names."""
    return names[index] if index < len(names) else str(index)
