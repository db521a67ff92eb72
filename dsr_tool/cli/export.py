"""dsr-tool export: write a model as one small, verified file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dsr_tool.cli.common import TableOption, emit, examples, model_option, result_options

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


@click.command(
    "export",
    epilog=examples(
        "dsr-tool export resnet18-90 -o resnet18-90.dsr",
        "dsr-tool export resnet18-90.dsr -o resnet18-90.onnx --values fp16",
        "dsr-tool export resnet18-90 -o resnet18-90.npz",
        "dsr-tool export resnet18-90.onnx -o dense.onnx --encoding dense",
    ),
)
@click.argument("source", metavar="MODEL_DIR", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The file to create.")
@click.option("--to", cls=TableOption, describe=_containers_help)
@click.option("--encoding", default="auto", show_default=True, cls=TableOption, describe=_encodings_help)
@click.option(
    "--values",
    default="fp32",
    show_default=True,
    help="fp32: exact; fp16: rounds weights, but not norms and biases.",
)
@click.option("--compact", is_flag=True, cls=TableOption, describe=_compact_help)
@click.option("--force", is_flag=True, help="Replace an existing file.")
@model_option
@result_options
def command(source: Path, output: Path, maker: str | None, as_json: bool, **options: Any) -> None:
    """Export the model in MODEL_DIR (or an archive) to one file.

    The file is executed and compared with the model before it is moved into place; if they differ, the exit code is 3
    and no file is left. Archives, ONNX and .npz files are small. Safetensors and state-dict files keep zeros in place,
    for tools that know no sparse format, and are as large as a dense model. If MODEL_DIR is a compact ONNX file, the
    output is a dense one. The size of an archive is compared with the budget in bytes of its model, if it has one.
    """
    from dsr_tool.files import refuse_existing
    from dsr_tool.report.budget import check_exported
    from dsr_tool.report.verification import verification_document, verification_text
    from exporters.containers import container_of
    from exporters.export import densify_export, export

    # Before the model is loaded and traced, which takes seconds.
    refuse_existing(output, force=options["force"])
    check = None
    if source.is_file() and container_of(source, "MODEL_DIR").name == "onnx":
        verification = densify_export(source, output, **options)
    else:
        from converters.loading import load

        model = load(source, maker)
        verification = export(model, output, **options)
        check = check_exported(model, verification)
    document = {**verification_document("export", verification), "budget": check.to_dict() if check else None}
    text = verification_text(verification) + (f"\n  {check.line}" if check else "")
    emit(document, text, as_json=as_json)
