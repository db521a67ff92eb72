"""Computed and measured memory of running and of training; each measurement is a child process of its own.

Run: python benchmarks/memory.py [--models resnet18 resnet50] [--batches 1 16] [--size 224] [--optimizer sgd]
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import dsr_tool
from dsr_tool.measure.memory.document import memory_document
from dsr_tool.measure.memory.request import MemoryRequest
from dsr_tool.measure.memory.schema import Comparison, MemoryDocument
from dsr_tool.report.sources import read


def rows(document: MemoryDocument) -> Iterator[tuple[str, Comparison]]:
    """Yields the figures of a document with a name for each row."""
    for row in document["inference"]:
        yield row["runtime"], row
    # None for a network that cannot train on such inputs.
    if document["training"]:
        yield f"training, {document['training']['optimizer']}", document["training"]


def cells(row: Comparison) -> str:
    """Returns the columns of a row; a dash stands for a figure that is only measured, or not measured at all."""
    sizes = [row[key] for key in ("computed_bytes", "measured_bytes", "load_peak_bytes")]
    computed, measured, loading = ("-" if nbytes is None else f"{nbytes / 1e6:.1f}" for nbytes in sizes)
    difference = "-" if row["difference"] is None else f"{row['difference']:+.1%}"
    return " ".join(f"{text:>12}" for text in (computed, measured, difference, loading))


def main() -> None:
    """Prints a table of all models and batches."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18", "resnet50"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--optimizer", default="sgd")
    arguments = parser.parse_args()
    # The figures hold for these versions: allocators and fusions change from release to release.
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "onnxruntime", "scipy"))
    print(
        f"{platform.machine()}, {packages}; sparsity {arguments.sparsity} (ERK), {arguments.size} px; MB are 10^6 bytes"
    )
    headers = [f"{title:>12}" for title in ("computed MB", "measured MB", "difference", "loading MB")]
    print(f"{'model':22} {'batch':>5}  {'what':24} {' '.join(headers)}")
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            # Saved, since a child process loads the folder itself.
            dsr_tool.convert(name, sparsity=arguments.sparsity, distribution="erk").save(path)
            source = read(path)
            for batch in arguments.batches:
                request = MemoryRequest(batch, arguments.size, arguments.optimizer, measured=True)
                for what, row in rows(memory_document(source, request)):
                    print(f"{name:22} {batch:5}  {what:24} {cells(row)}", flush=True)


if __name__ == "__main__":
    main()
