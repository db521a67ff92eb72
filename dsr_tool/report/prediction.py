"""Predictions of a file for pictures or arrays, as a document and as text. Never imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import numpy.typing as npt

from dsr_tool.errors import DsrError, FormatError, UsageError, unknown_name
from dsr_tool.files import require_file
from dsr_tool.runtime import Session, load_inputs
from dsr_tool.runtime.coverage import CoverageDocument
from dsr_tool.runtime.source import Model, open_model
from exporters.containers import container_of

if TYPE_CHECKING:
    from exporters.onnx.session import OnnxSession

__all__ = ["Prediction", "PredictionDocument", "prediction_document", "prediction_text"]

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


class Prediction(TypedDict):
    """The prediction for one input.

    Attributes:
        input: path of the file, with an index if the file holds several inputs.
        top: classes with the highest scores, in descending order.
    """

    input: str
    top: list[_ClassScore]


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
        file: an archive or an ONNX file.
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
    model = _open(file, inputs)
    names = _class_names(labels, model)
    batches = [load_inputs([path], model.config) for path in inputs]
    session = _session(model, runtime, threads)
    batch = np.concatenate(batches)
    outputs = np.concatenate([session.run(batch[i : i + _CHUNK]) for i in range(0, len(batch), _CHUNK)])
    # The softmax of such scores would be NaN for every class, and NaN is not JSON.
    if not np.isfinite(outputs).all():
        raise DsrError(
            f"the outputs of {str(file)!r} contain NaN or inf; check the scale of the inputs and verify the file."
        )
    sources = [name for path, part in zip(inputs, batches, strict=True) for name in _input_names(path, len(part))]
    return {
        "schema": "dsr-tool/predict/1",
        "file": str(file),
        "runtime": runtime,
        "fallback": session.coverage.to_dict() if isinstance(session, Session) and session.coverage else None,
        "predictions": [
            # A classifier has one score a class and input; a segmentation model has one a class and pixel.
            {"input": source, "top": (_top_classes if row.ndim == 1 else _pixel_shares)(row, names, top)}
            for source, row in zip(sources, outputs, strict=True)
        ],
    }


def prediction_text(document: PredictionDocument) -> str:
    """Returns one line per input, with its classes in descending order."""
    lines = []
    for prediction in document["predictions"]:
        parts = [f"{one['label']} {_share(one):.1%}" for one in prediction["top"]]
        unit = " of the pixels" if "pixels" in prediction["top"][0] else ""
        lines.append(f"{prediction['input']}: {', '.join(parts)}{unit}")
    return "\n".join(lines)


def _share(score: _ClassScore) -> float:
    """Returns the probability of a class, or its share of the pixels."""
    return score["probability"] if "probability" in score else score["pixels"]


def _open(file: Path, inputs: Sequence[Path]) -> Model:
    """Opens the file. Refuses pictures next to an ONNX file, which does not say how pictures become inputs."""
    pictures = [path for path in inputs if path.suffix.lower() != ".npy"]
    if pictures and not container_of(file, "FILE").preprocesses:
        raise UsageError(
            f"{str(file)!r} does not say how to preprocess pictures such as {str(pictures[0])!r}; give .npy arrays, "
            f"or an archive of the model."
        )
    return open_model(file)


def _class_names(path: Path | None, model: Model) -> tuple[str, ...]:
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


def _session(model: Model, runtime: str, threads: int | None) -> Session | OnnxSession:
    """Returns a session of the model on the runtime that the user chose."""
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
