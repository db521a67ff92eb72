"""dsr-tool predict: run a file on pictures or arrays."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsr_tool.cli.common import emit, examples, result_options

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from dsr_tool.runtime import Session
    from dsr_tool.runtime.source import Model
    from exporters.onnx.session import OnnxSession

__all__ = ["command"]

_RUNTIMES = ("sparse", "scipy", "onnxruntime")
_AT_ONCE = 16


@click.command(
    "predict",
    epilog=examples(
        "dsr-tool predict resnet18-90.dsr cat.jpg dog.jpg --top 3",
        "dsr-tool predict resnet18-90.dsr batch.npy --runtime onnxruntime --json",
    ),
)
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("inputs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--runtime", default="sparse", show_default=True, help="sparse, scipy or onnxruntime.")
@click.option("--threads", type=click.IntRange(1, 256), help="For one call; 1, or every core with onnxruntime.")
@click.option("--top", type=click.IntRange(min=1), default=5, show_default=True, help="How many classes to print.")
@click.option("--labels", type=click.Path(path_type=Path), help="Text file of class names, one a line.")
@result_options
def command(
    file: Path,
    inputs: tuple[Path, ...],
    runtime: str,
    threads: int | None,
    top: int,
    labels: Path | None,
    as_json: bool,
) -> None:
    """Run the archive or ONNX FILE on pictures, or on .npy arrays that are preprocessed already.

    Classifiers give probabilities; segmentation gives the share of pixels of each class. `sparse` runs compiled
    kernels where there are some (`dsr-tool doctor` says), else `scipy`, the reference; neither imports torch.
    """
    import numpy as np

    from dsr_tool.errors import DsrError, unknown_name
    from dsr_tool.runtime import load_inputs

    if runtime not in _RUNTIMES:
        raise unknown_name("--runtime", runtime, _RUNTIMES)
    model = _opened(file, inputs)
    names = _labels(labels, model)
    batches = [load_inputs([path], model.config) for path in inputs]
    outputs = _run(model, runtime, threads, np.concatenate(batches))
    if not np.isfinite(outputs).all():
        raise DsrError("the model's outputs are not finite; look at the scale of the inputs, and verify the file.")
    sources = [name for path, batch in zip(inputs, batches, strict=True) for name in _inputs(path, len(batch))]
    predictions = [
        {"input": source, "top": (_best if row.ndim == 1 else _pixels)(row, names, top)}
        for source, row in zip(sources, outputs, strict=True)
    ]
    document = {
        "schema": "dsr-tool/predict/1",
        "file": str(file),
        "runtime": runtime,
        "predictions": predictions,
    }
    emit(document, _text(document), as_json=as_json)


def _opened(file: Path, inputs: tuple[Path, ...]) -> Model:
    """The file; raises `UsageError` for pictures beside one that does not say how they become inputs."""
    from dsr_tool.errors import UsageError
    from dsr_tool.runtime.source import open_model

    pictures = [path for path in inputs if path.suffix.lower() != ".npy"]
    if pictures and file.suffix.lower() == ".onnx":
        raise UsageError(
            f"{str(file)!r} does not say how pictures such as {str(pictures[0])!r} become inputs; give .npy arrays, or "
            f"an archive of the model."
        )
    return open_model(file)


def _inputs(path: Path, count: int) -> list[str]:
    """What to call the inputs of a file; an array may hold several."""
    return [str(path)] if count == 1 else [f"{path}[{i}]" for i in range(count)]


def _run(model: Model, runtime: str, threads: int | None, batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    import numpy as np

    session = _session(model, runtime, threads)
    # A few at a time: activations take far more memory than inputs.
    return np.concatenate([session.run(batch[i : i + _AT_ONCE]) for i in range(0, len(batch), _AT_ONCE)])


def _session(model: Model, runtime: str, threads: int | None) -> Session | OnnxSession:
    if runtime == "onnxruntime":
        from exporters.onnx.write import to_onnx
        from exporters.onnx.session import OnnxSession

        tensors = {name: model.tensor(name) for name in model.graph.parameters}
        return OnnxSession(to_onnx(model.graph, tensors, encoding="dense").SerializeToString(), threads=threads)
    from dsr_tool.runtime import Session

    return Session(model, threads=threads or 1, runtime="scipy" if runtime == "scipy" else "auto")


def _labels(path: Path | None, model: Model) -> tuple[str, ...]:
    if path is None:
        return model.config.labels
    from dsr_tool.errors import FormatError, UsageError
    from dsr_tool.files import require_file

    require_file(path, "--labels")
    try:
        names = tuple(path.read_text(encoding="utf-8").splitlines())
    except UnicodeDecodeError as error:
        raise FormatError(f"--labels {str(path)!r} is not UTF-8 text ({error}).") from error
    if len(names) < model.config.num_classes:
        raise UsageError(
            f"--labels {str(path)!r} has {len(names)} lines; the model has {model.config.num_classes} classes."
        )
    return names


def _best(scores: npt.NDArray[np.float32], names: tuple[str, ...], top: int) -> list[dict[str, Any]]:
    import numpy as np

    exponents = np.exp((scores - scores.max()).astype(np.float64))
    probabilities = exponents / exponents.sum()
    best = np.argsort(-probabilities, kind="stable")[:top]
    return [
        {"class": int(i), "label": names[i] if i < len(names) else str(i), "probability": float(probabilities[i])}
        for i in best
    ]


def _pixels(scores: npt.NDArray[np.float32], names: tuple[str, ...], top: int) -> list[dict[str, Any]]:
    """Shares of the pixels by class, from scores (classes, height, width)."""
    import numpy as np

    counts = np.bincount(scores.argmax(axis=0).ravel(), minlength=len(scores))
    best = np.argsort(-counts, kind="stable")[:top]
    return [
        {"class": int(i), "label": names[i] if i < len(names) else str(i), "pixels": float(counts[i] / counts.sum())}
        for i in best
        if counts[i]
    ]


def _text(document: dict[str, Any]) -> str:
    lines = []
    for prediction in document["predictions"]:
        parts = [f"{one['label']} {one.get('probability', one.get('pixels')):.1%}" for one in prediction["top"]]
        best = ", ".join(parts) + (" of the pixels" if "pixels" in prediction["top"][0] else "")
        lines.append(f"{prediction['input']}: {best}")
    return "\n".join(lines)
