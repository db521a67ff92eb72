"""dsr-tool export: a model as one small, verified file."""

from __future__ import annotations

from pathlib import Path

import click

from dsr_tool.cli.common import emit, examples, result_options

__all__ = ["command"]


@click.command(
    "export",
    epilog=examples(
        "dsr-tool export resnet18-90 -o resnet18-90.dsr",
        "dsr-tool export resnet18-90 -o resnet18-90.onnx --to onnx",
    ),
)
@click.argument("model_dir", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The file to make.")
@click.option("--to", help="archive (default) or onnx (default where the file is called .onnx).")
@click.option(
    "--encoding",
    default="auto",
    show_default=True,
    help="auto is the smallest per layer; archive: delta, bitmask, csr, dense; onnx: delta, dense.",
)
@click.option("--force", is_flag=True, help="Replace an existing file.")
@result_options
def command(model_dir: Path, output: Path, to: str | None, encoding: str, force: bool, as_json: bool) -> None:
    """Export the model in MODEL_DIR (or an archive) to one file.

    The file is run and compared with the model before it takes its name; when it does not hold the model, the exit
    code is 3 and no file is left.
    """
    from converters.convert import load
    from dsr_tool.core.files import refuse_existing
    from dsr_tool.report.verification import verification_document, verification_text
    from exporters.export import export

    refuse_existing(output, force=force)
    verification = export(load(model_dir), output, to=to, encoding=encoding, force=force)
    document = verification_document("export", verification)
    emit(document, verification_text(verification), as_json=as_json)
