"""dsr-tool bench: is the sparse runtime faster than the dense model, for this file on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dsr_tool.cli.common import emit, examples, note, output_options

__all__ = ["command"]


@click.command(
    "bench",
    epilog=examples("dsr-tool bench resnet18-90.dsr", "dsr-tool bench resnet18-90.onnx --batch 16 --threads 2 --json"),
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--batch", type=int, default=1, show_default=True, help="Inputs at once.")
@click.option("--threads", type=int, default=1, show_default=True, help="Of both runtimes.")
@click.option("--rounds", type=int, default=20, show_default=True, help="How often both take their turn.")
@click.option("--runtime", default="sparse", show_default=True, help="Ours: sparse or scipy.")
@output_options
def command(file: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Measure FILE, an archive or an ONNX file, against its dense model in onnxruntime: latency, start and memory.

    Both take turns on the same input in one run. The ratio is the median over pairs, with its quartiles; where these
    include 1, neither is faster. Start and memory are the medians of three child processes each, above what the
    libraries take.
    """
    from dsr_tool.measure.latency import Settings, bench_document
    from dsr_tool.measure.latency_text import bench_text

    document = bench_document(file, Settings(**options), lambda text: note(text, quiet=quiet))
    emit(document, bench_text(document), as_json=as_json)
