"""dsr-tool export: write a model as one small, verified file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dsr_tool.cli.common import FilePath, TableOption, emit, examples, model_option, output_options, parse_shape
from dsr_tool.cli.progress import progress_bar

__all__ = ["command"]


def _containers_help() -> str:
    from exporters.containers import listed

    return f"{listed()}; default: by the suffix of the output file, else archive."


def _encodings_help() -> str:
    from exporters.containers import CONTAINERS

    names = dict.fromkeys(name for one in CONTAINERS.values() for name in one.encodings if name != "auto")
    return f"auto: the smallest per layer; or one that the container has, for all: {', '.join(names)}."


def _compact_help() -> str:
    from exporters.containers import listed

    return f"Remove channels that no active weight reaches; for {listed(lambda one: one.compacts)}."


def _parse_levels(
    context: click.Context,  # noqa: ARG001 - click's signature
    parameter: click.Parameter,  # noqa: ARG001
    value: str | None,
) -> tuple[str, ...] | None:
    """Reads names that are written as avx512,avx2; None for an option that is not given."""
    return None if value is None else tuple(part.strip() for part in value.split(","))


@click.command(
    "export",
    epilog=examples(
        "dsr-tool export resnet18-90 -o resnet18-90.dsr",
        "dsr-tool export resnet18-90.dsr -o resnet18-90.onnx --values fp16",
        "dsr-tool export resnet18-90 -o resnet18-90-int5.dsr --values int5 --calibrate photographs",
        "dsr-tool export resnet18-90 -o resnet18-90-int8.dsr --values int8 --images others --min-agreement 0.98",
        "dsr-tool export resnet18-90 -o resnet18-90.npz",
        "dsr-tool export resnet18-90 -o resnet18-90.dsrplan --batch 1",
        "dsr-tool export resnet18-90.onnx -o dense.onnx --encoding dense",
        "dsr-tool export pruned-elsewhere.onnx -o small.dsr --input-shape 3,640,640",
    ),
)
@click.argument("source", metavar="MODEL_DIR", type=FilePath())
@click.option("-o", "--output", required=True, type=FilePath(), help="The file to create.")
@click.option("--to", cls=TableOption, describe=_containers_help)
@click.option("--encoding", default="auto", show_default=True, cls=TableOption, describe=_encodings_help)
@click.option(
    "--values",
    default="fp32",
    show_default=True,
    help="fp32, or palette (for few distinct values): exact; fp16, int8, int6, int5 or int4: rounds weights, but not "
    "norms and biases.",
)
@click.option("--compact", is_flag=True, cls=TableOption, describe=_compact_help)
@click.option(
    "--calibrate",
    metavar="DIR",
    help="Photographs, unlabelled, to round to few bits by, so that the outputs of each layer stay.",
)
@click.option("--calibration-images", type=int, metavar="N", help="Use at most N of them; default 256.")
@click.option(
    "--input-shape",
    callback=parse_shape,
    metavar="C,H,W",
    help="Shape of one input, for an ONNX file that takes any size; the new file takes this one alone.",
)
@click.option("--images", metavar="DIR", help="Other pictures, to count how often the file answers as the model does.")
@click.option("--min-agreement", type=float, metavar="X", help="Least share of these answers, such as 0.98.")
@click.option("--batch", type=int, metavar="N", help="Inputs of one run of a plan; default 1.")
@click.option(
    "--level",
    "levels",
    callback=_parse_levels,
    metavar="L[,L]",
    help="Levels of the processor that a plan is compiled for: avx512, avx2, baseline or neon; default: all that the "
    "library holds.",
)
@click.option("--force", is_flag=True, help="Replace an existing file.")
@model_option
@output_options
def command(
    source: Path,
    output: Path,
    input_shape: tuple[int, ...],
    maker: str | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Export the model in MODEL_DIR (or an archive, or an ONNX file of any tool) to one file.

    The file is executed and compared with the model before it is moved into place; if they differ, the exit code is 3
    and no file is left. Archives, ONNX and .npz files are small. Safetensors and state-dict files keep zeros in place,
    for tools that know no sparse format, and are as large as a dense model. An ONNX file becomes an archive or another
    ONNX file, in which its zeros take no space, and is compared with ONNX Runtime on the original. The size of an
    archive is compared with the budget in bytes of its model, if it has one.
    """
    from dsr_tool.errors import UsageError
    from dsr_tool.files import refuse_existing
    from dsr_tool.report.budget import check_exported
    from dsr_tool.report.verification import verification_document, verification_text
    from exporters.containers import container_of
    from exporters.export import export, export_onnx

    # Before the model is loaded and traced, which takes seconds.
    refuse_existing(output, force=options["force"])
    check = None
    if source.is_file() and container_of(source, "MODEL_DIR").name == "onnx":
        verification = export_onnx(source, output, input_shape=input_shape, **options)
    else:
        if input_shape:
            raise UsageError("--input-shape is for ONNX files that take inputs of any size; a model has its own.")
        from converters.loading import load

        model = load(source, maker)
        with progress_bar("calibrating", quiet=quiet or options["calibrate"] is None) as on_progress:
            verification = export(model, output, **options, on_progress=on_progress)
        check = check_exported(model, verification)
    document = {**verification_document("export", verification), "budget": check.to_dict() if check else None}
    text = verification_text(verification) + (f"\n  {check.line}" if check else "")
    emit(document, text, as_json=as_json)
