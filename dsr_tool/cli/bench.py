"""dsr-tool bench: measure whether the sparse runtime is faster than the dense model, on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dsr_tool.cli.common import FilePath, emit, examples, note, output_options

__all__ = ["command"]


@click.command(
    "bench",
    epilog=examples(
        "dsr-tool bench resnet18-90.dsr",
        "dsr-tool bench resnet18-90.onnx --batch 16 --threads 2 --json",
        "dsr-tool bench resnet18-90.dsr --layers",
    ),
)
@click.argument("file", type=FilePath())
@click.option("--batch", type=int, default=1, show_default=True, help="Inputs per batch.")
@click.option("--threads", type=int, default=1, show_default=True, help="Threads of both runtimes.")
@click.option("--rounds", type=int, default=20, show_default=True, help="Pairs of measurements.")
@click.option("--runtime", default="sparse", show_default=True, help="Our runtime: sparse or scipy.")
@click.option("--layers", is_flag=True, help="Also time each op, and compare it with the processor's peak.")
@output_options
def command(file: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Measure FILE, an archive or ONNX file, against its dense model in ONNX Runtime: latency, load time and memory.

    The two alternate on the same input in one run. The ratio is the median over pairs, with its quartiles; if these
    include 1, neither is faster. Load time and memory are medians of three child processes each, without what the
    libraries themselves take. With --layers a table lists every op with its time, its share, its useful GFLOP/s and
    how the work is cut; useful are multiply-adds of active weights with pixels that exist.
    """
    from dsr_tool.measure.latency import Settings, bench_document
    from dsr_tool.measure.latency_text import bench_text

    document = bench_document(file, Settings(**options), lambda text: note(text, quiet=quiet))
    emit(document, bench_text(document), as_json=as_json)
