"""dsr-tool verify: does a file still compute what its model computes?"""

from __future__ import annotations

from pathlib import Path

import click

from dsr_tool.cli.common import emit, examples, model_option, result_options

__all__ = ["command"]


@click.command(
    "verify",
    epilog=examples(
        "dsr-tool verify resnet18-90.dsr --against resnet18-90",
        "dsr-tool verify resnet18-90.npz --against resnet18-90 --json",
    ),
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--against", required=True, type=click.Path(path_type=Path), help="The model folder it came from.")
@model_option
@result_options
def command(file: Path, against: Path, maker: str | None, as_json: bool) -> int:
    """Compare FILE, of any kind that `export` writes, with the model it came from; exit code 3 when they differ."""
    from converters.loading import load
    from dsr_tool.errors import CheckFailed, FormatError
    from dsr_tool.files import require_file
    from dsr_tool.report.verification import verification_document, verification_text
    from exporters.export import verify

    require_file(file, "FILE")
    model = load(against, maker)
    try:
        verification = verify(file, model)
    except FormatError as error:
        # Here a damaged file is what was asked about, not what got in the way.
        raise CheckFailed(str(error)) from error
    document = verification_document("verify", verification)
    emit(document, verification_text(verification), as_json=as_json)
    return 0 if verification.passed else 3
