"""dsr-tool report: account for every weight, byte and multiply-add."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dsr_tool.cli.common import FilePath, emit, examples, model_option, output_options
from dsr_tool.cli.progress import progress_bar

__all__ = ["command"]


@click.command(
    "report",
    epilog=examples(
        "dsr-tool report resnet18-90",
        "dsr-tool report resnet18-90.dsr --json > footprint.json",
        "dsr-tool report runs/digits --html digits.html",
        "dsr-tool report resnet18-90.dsr --budget 5MB",
        "dsr-tool report resnet18-90 --memory --batch 16 --measure",
        "dsr-tool report resnet18-90.dsr --accuracy photos --against resnet18.pth",
    ),
)
@click.argument("path", type=FilePath())
@click.option("--html", type=FilePath(), help="Also write the report as one self-contained page.")
@click.option("--budget", help="Print only whether it fits 5.1Mparams, 12MB, 12MiB or 0.8GMACs; exit code 3 if not.")
@click.option("--force", is_flag=True, help="Replace an existing page.")
@click.option("--memory", is_flag=True, help="Print only the memory of inference, by runtime, and of training.")
@click.option("--batch", type=int, help="With --memory: inputs per batch (default 1).")
@click.option("--input-size", type=int, help="With --memory, for a folder: side of the square input in pixels.")
@click.option("--optimizer", help="With --memory: sgd (default), sgd-plain, adam, adamw or rmsprop.")
@click.option("--measure", "measured", is_flag=True, help="With --memory: also measure it, in child processes.")
@click.option(
    "--accuracy",
    type=FilePath(),
    metavar="DIR",
    help="Print only top-1 and top-5 on a folder of pictures: class folders, or a labels.csv.",
)
@click.option(
    "--against",
    type=FilePath(),
    metavar="MODEL",
    help="With --accuracy: also a dense model folder, weights or a file; how often both agree, and the KL divergence.",
)
@model_option
@output_options
def command(
    path: Path,
    html: Path | None,
    budget: str | None,
    maker: str | None,
    force: bool,
    as_json: bool,
    quiet: bool,
    memory: bool,
    accuracy: Path | None,
    against: Path | None,
    **options: Any,
) -> None:
    """Report the footprint of PATH: a model folder, run folder, .dsr archive, .onnx file or .npz file.

    The report has, per layer and in total, parameters, active weights, density, bytes as dense, CSR, bitmask and coded,
    the entropy bound, and multiply-adds. It gives sparsity against both denominators, and the size on disk next to the
    computed one. The page of --html shows the same as charts, with a picture of each mask, and for a run its course.

    --budget counts the bytes of a file on disk or, for a folder, of the archive that it exports to. --memory computes
    weights and activations for each runtime and, for a folder, what a training step holds. --accuracy runs PATH on
    pictures: class folders are named by class or by number from 0 or, one for each class, sorted; labels.csv has the
    columns path and class.
    """
    from dsr_tool.errors import CheckFailed
    from dsr_tool.files import refuse_existing
    from dsr_tool.measure.accuracy.document import accuracy_document
    from dsr_tool.measure.accuracy.request import accuracy_request
    from dsr_tool.measure.accuracy.text import accuracy_text
    from dsr_tool.measure.memory.document import memory_document
    from dsr_tool.measure.memory.request import memory_request
    from dsr_tool.measure.memory.text import memory_text
    from dsr_tool.report.budget import check_source
    from dsr_tool.report.fallbacks import fallback_document
    from dsr_tool.report.sources import read
    from dsr_tool.report.tables import report_document, report_text
    from dsr_tool.runtime.coverage import coverage_text
    from dsr_tool.sparsity.budget import Budget

    if html:
        refuse_existing(html, force=force)
    allowed = Budget.parse(budget) if budget is not None else None
    wanted = memory_request(memory, maker=maker, **options)
    pictures = accuracy_request(accuracy, against=against, maker=maker)
    source = read(path)
    check = check_source(source, allowed, maker) if allowed else None
    fallback = fallback_document(source)
    document = {**report_document(source), "budget": check.to_dict() if check else None, "fallback": fallback}
    if wanted:
        document["memory"] = memory_document(source, wanted)
    if pictures:
        with progress_bar("accuracy", quiet=quiet) as on_progress:
            document["accuracy"] = accuracy_document(path, pictures, on_progress)
    if html:
        from dsr_tool.report.page.page import write_page

        # The page shows budget, memory and accuracy, which are only in the document, in sections of their own.
        write_page(html, source, document, force=force)
    if check or wanted or pictures:
        lines = [
            *([check.line] if check else []),
            *([memory_text(document["memory"])] if wanted else []),
            *([accuracy_text(document["accuracy"])] if pictures else []),
        ]
    else:
        lines = [report_text(source, document), *([coverage_text(fallback)] if fallback else [])]
    emit(document, "\n".join(lines), as_json=as_json)
    if check and not check.fits:
        click.get_current_context().exit(CheckFailed.exit_code)
