"""dsr-tool predict: run a file on pictures or arrays."""

from __future__ import annotations

from pathlib import Path

import click

from dsr_tool.cli.common import FilePath, emit, examples, result_options

__all__ = ["command"]


@click.command(
    "predict",
    epilog=examples(
        "dsr-tool predict resnet18-90.dsr cat.jpg dog.jpg --top 3",
        "dsr-tool predict resnet18-90.dsr batch.npy --runtime onnxruntime --json",
    ),
)
@click.argument("file", type=FilePath())
@click.argument("inputs", nargs=-1, required=True, type=FilePath())
@click.option("--runtime", default="sparse", show_default=True, help="sparse, scipy or onnxruntime.")
@click.option(
    "--threads", type=click.IntRange(1, 256), help="Worker threads; default: 1, or every core with onnxruntime."
)
@click.option("--top", type=click.IntRange(min=1), default=5, show_default=True, help="Number of classes to print.")
@click.option("--labels", type=FilePath(), help="Text file with one class name per line.")
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
    """Run FILE, an archive or ONNX file, on pictures or on preprocessed .npy arrays.

    Classifiers give the probability of each class; segmentation models give the share of pixels of each class.
    `sparse` runs compiled kernels if they are installed (`dsr-tool doctor` says so), otherwise the reference, which is
    also `scipy`. Neither imports torch.
    """
    from dsr_tool.report.prediction import prediction_document, prediction_text

    document = prediction_document(file, inputs, runtime=runtime, threads=threads, top=top, labels=labels)
    emit(document, prediction_text(document), as_json=as_json)
