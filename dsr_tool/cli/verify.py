"""dsr-tool verify: check that a file computes what its model computes."""

from __future__ import annotations

from pathlib import Path

import click

from dsr_tool.cli.common import FilePath, emit, examples, model_option, result_options

__all__ = ["command"]


@click.command(
    "verify",
    epilog=examples(
        "dsr-tool verify resnet18-90.dsr --against resnet18-90",
        "dsr-tool verify resnet18-90.npz --against resnet18-90 --json",
    ),
)
@click.argument("file", type=FilePath())
@click.option(
    "--against",
    required=True,
    type=FilePath(),
    help="The model folder that FILE was exported from, or the ONNX file.",
)
@model_option
@result_options
def command(file: Path, against: Path, maker: str | None, as_json: bool) -> int:
    """Compare FILE, in any format that `export` writes, with the model of its origin; exit code 3 if they differ."""
    from converters.loading import load
    from dsr_tool.errors import CheckFailed, FormatError
    from dsr_tool.files import require_file
    from dsr_tool.report.verification import verification_document, verification_text
    from exporters.containers import container_of
    from exporters.export import verify, verify_onnx_export

    require_file(file, "FILE")
    # An ONNX file that was exported is its own reference: there is no model in PyTorch.
    foreign = against.is_file() and container_of(against, "--against").name == "onnx"
    model = None if foreign else load(against, maker)
    try:
        verification = verify_onnx_export(file, against) if model is None else verify(file, model)
    except FormatError as error:
        # A damaged file answers the question that this command asks, so it is a failed check (3), not an error (1).
        raise CheckFailed(str(error)) from error
    document = verification_document("verify", verification)
    emit(document, verification_text(verification), as_json=as_json)
    return 0 if verification.passed else CheckFailed.exit_code
