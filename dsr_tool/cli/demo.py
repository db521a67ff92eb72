"""dsr-tool demo: convert, train and export on a small real data set that comes with scikit-learn."""

from __future__ import annotations

from pathlib import Path

import click

from dsr_tool.cli.common import emit, examples, note, output_options

__all__ = ["command"]


@click.command("demo", epilog=examples("dsr-tool demo", "dsr-tool demo -o demo-out --epochs 2 --force"))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("demo-out"),
    show_default=True,
    help="The folder to create.",
)
@click.option("--epochs", type=click.IntRange(min=1), default=12, show_default=True, help="Epochs of each training.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of weights, masks and order of images.")
@click.option("--force", is_flag=True, help="Replace an existing output folder.")
@output_options
def command(output: Path, epochs: int, seed: int, force: bool, as_json: bool, quiet: bool) -> int:
    """Train a ResNet-18 on scikit-learn's digits three times: dense, at 90 % sparsity with DSR, and with static masks.

    Each model is exported as archive and compact ONNX file, verified in both runtimes, and listed in one table. Exit
    code 3 if a file does not compute what its model computes.
    """
    from dsr_tool.compare.demo import demo_text, run_demo
    from dsr_tool.errors import CheckFailed

    document = run_demo(
        output, epochs=epochs, seed=seed, force=force, quiet=quiet, notify=lambda line: note(line, quiet=quiet)
    )
    emit(document, demo_text(document), as_json=as_json)
    return 0 if all(row["verified"] for row in document["runs"]) else CheckFailed.exit_code
