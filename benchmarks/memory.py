"""Memory of running and of training, computed beside measured, each measurement in a child process of its own.

Run: python benchmarks/memory.py [--models resnet18 resnet50] [--batches 1 16] [--size 224] [--optimizer sgd]
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import dsr_tool
from dsr_tool.measure.memory.document import Wanted, memory_document
from dsr_tool.report.sources import read


def lines(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is computed and measured in a document, with its name."""
    for row in document["inference"]:
        yield row["runtime"], row
    if document["training"]:
        yield f"training, {document['training']['optimizer']}", document["training"]


def main() -> None:
    """Print a table for each model and batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18", "resnet50"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--optimizer", default="sgd")
    arguments = parser.parse_args()
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "onnxruntime", "scipy"))
    print(
        f"{platform.machine()}, {packages}; sparsity {arguments.sparsity} (ERK), {arguments.size} px; MB are 10^6 bytes"
    )
    headers = [f"{title:>12}" for title in ("computed MB", "measured MB", "difference", "loading MB")]
    print(f"{'model':22} {'batch':>5}  {'what':20} {' '.join(headers)}")
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            dsr_tool.convert(name, sparsity=arguments.sparsity, distribution="erk").save(path)
            source = read(path)
            for batch in arguments.batches:
                wanted = Wanted(batch, arguments.size, arguments.optimizer, measured=True)
                for what, row in lines(memory_document(source, wanted)):
                    sizes = [f"{row[key] / 1e6:12.1f}" for key in ("computed_bytes", "measured_bytes")]
                    ends = f"{row['difference']:+12.1%} {row['load_peak_bytes'] / 1e6:12.1f}"
                    print(f"{name:22} {batch:5}  {what:20} {' '.join(sizes)} {ends}", flush=True)


if __name__ == "__main__":
    main()
