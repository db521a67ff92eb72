"""The demo's results: the keys of its JSON document, and the table for a terminal."""

from __future__ import annotations

from typing import TypedDict

from dsr_tool.measure.latency_schema import Latency
from dsr_tool.report.tables import megabytes, plain_table, render

__all__ = ["DemoDocument", "DemoRun", "demo_text"]


class DemoRun(TypedDict):
    """One row of the demo.

    Attributes:
        name: name of its folder and files.
        method: training method.
        epochs: number of epochs.
        start_accuracy: fraction of test images classified correctly before the first epoch.
        test_accuracy: fraction of test images classified correctly after the last epoch.
        active_weights: number of active weights among the prunable ones.
        prunable_weights: number of weights that the masks cover.
        sparsity_of_prunable_weights: fraction of zeros among the prunable weights.
        sparsity_of_whole_model: fraction of zeros among all parameters.
        dense_fp32_bytes: size of all parameters in fp32, zeros included, in bytes.
        archive_bytes: size of the archive in bytes.
        onnx_bytes: size of the ONNX file in bytes.
        latency: time of the archive beside the dense model in ONNX Runtime, of one input on one thread.
        train_time_s: duration of all epochs, with their evaluations and what they write to disk.
        train_peak_bytes: most memory that the process held while it trained, above what it held before the model
            existed; None on a GPU and on systems that do not tell it.
        verified: whether both files passed, the archive in both runtimes.
        largest_difference: largest absolute difference from PyTorch's outputs, by runtime.
    """

    name: str
    method: str
    epochs: int
    start_accuracy: float | None
    test_accuracy: float
    active_weights: int
    prunable_weights: int
    sparsity_of_prunable_weights: float
    sparsity_of_whole_model: float
    dense_fp32_bytes: int
    archive_bytes: int
    onnx_bytes: int
    latency: Latency
    train_time_s: float
    train_peak_bytes: int | None
    verified: bool
    largest_difference: dict[str, float]


class DemoDocument(TypedDict):
    """The demo as JSON, schema `dsr-tool/demo/1`.

    Attributes:
        schema: name and version of the schema.
        output: path of the demo's folder.
        architecture: name of the model.
        data: name of the data set.
        epochs: number of epochs of each training from random weights.
        batch_size: number of images of a training step.
        seed: seed of weights, masks and order of images.
        threads: number of threads that torch trained with.
        time_s: duration of the whole demo in seconds.
        runs: one entry for each row.
    """

    schema: str
    output: str
    architecture: str
    data: str
    epochs: int
    batch_size: int
    seed: int
    threads: int
    time_s: float
    runs: list[DemoRun]


def demo_text(document: DemoDocument) -> str:
    """Returns the results as a table, with what its columns mean and where the files are."""
    numbers = ("epochs", "accuracy", "active weights", "archive MB", "ONNX MB", "dense ÷ ours", "train s", "train MB")
    table = plain_table("run", *numbers, "verified", numbers=(*numbers, "verified"))
    for row in document["runs"]:
        peak = row["train_peak_bytes"]
        table.add_row(
            row["name"],
            str(row["epochs"]),
            f"{row['test_accuracy']:.2%}",
            f"{row['active_weights']:,}",
            megabytes(row["archive_bytes"]),
            megabytes(row["onnx_bytes"]),
            f"{row['latency']['ratio']['median']:.2f}",
            f"{row['train_time_s']:.1f}",
            "" if peak is None else f"{peak / 1e6:.0f}",
            "yes" if row["verified"] else "NO",
        )
    return "\n".join([render(table), *_closing(document)])


def _closing(document: DemoDocument) -> list[str]:
    """Returns what was run, what the columns mean, and where the files are."""
    dense, tuned, *_, last = document["runs"]
    folder = document["output"]
    threads = "1 thread" if document["threads"] == 1 else f"{document['threads']} threads"
    size = f"{dense['prunable_weights']:,} prunable weights, {megabytes(dense['dense_fp32_bytes'])} MB in fp32"
    start = f", where it had {tuned['start_accuracy']:.2%}" if tuned["start_accuracy"] is not None else ""
    return [
        f"{document['architecture']} ({size}) on {document['data']}, one image in five held out",
        f"{tuned['name']} starts from the weights of {dense['name']}{start}, the others from random ones",
        "dense ÷ ours: time of the dense model in ONNX Runtime ÷ time of the archive, in turns; one input, one thread",
        f"train: {threads}, batches of {document['batch_size']}; most memory held, above that before the model",
        "verified: the archive gives back every bit, and both files compute what PyTorch computes",
        f"{document['time_s']:.0f} s in all; files and reports: {folder}/ (start with {folder}/{last['name']}.txt)",
    ]
