"""dsr-tool report: where every weight, byte and multiply-add is."""

from __future__ import annotations

from pathlib import Path

import click

from dsr_tool.cli.common import emit, examples, result_options

__all__ = ["command"]


@click.command(
    "report",
    epilog=examples("dsr-tool report resnet18-90", "dsr-tool report resnet18-90.dsr --json > footprint.json"),
)
@click.argument("path", type=click.Path(path_type=Path))
@result_options
def command(path: Path, as_json: bool) -> None:
    """Report the footprint of PATH: a model folder, run folder, .dsr archive or .onnx file.

    Per layer and in all: parameters, active weights, density, bytes as dense, CSR, bitmask and coded, the entropy
    bound, and multiply-adds; sparsity against both denominators; and the size on disk beside the computed one.
    """
    from dsr_tool.report.sources import read
    from dsr_tool.report.tables import report_document, report_text

    source = read(path)
    emit(report_document(source), report_text(source), as_json=as_json)
