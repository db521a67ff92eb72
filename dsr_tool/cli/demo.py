"""dsr-tool demo: convert, train, export and time on a small real data set that comes with scikit-learn."""

from __future__ import annotations

from pathlib import Path

import click

from dsr_tool.cli.common import FilePath, emit, examples, note, output_options

__all__ = ["command"]


@click.command("demo", epilog=examples("dsr-tool demo", "dsr-tool demo -o demo-out --epochs 12 --force"))
@click.option(
    "-o",
    "--output",
    type=FilePath(),
    default=Path("demo-out"),
    show_default=True,
    help="The folder to create.",
)
@click.option("--epochs", type=click.IntRange(min=1), default=6, show_default=True, help="Epochs from random weights.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of weights, masks and order of images.")
@click.option("--force", is_flag=True, help="Replace an existing output folder.")
@output_options
def command(output: Path, epochs: int, seed: int, force: bool, as_json: bool, quiet: bool) -> int:
    """Train a ResNet-18 on scikit-learn's digits, dense and at 90 % sparsity, from random and from trained weights.

    The four rows are the dense network; that network at 90 % sparsity, fine-tuned for two epochs; and two that are
    trained at 90 % from random weights, with static masks and with DSR. Each is exported as archive and compact ONNX
    file, verified in both runtimes, timed beside the dense model in ONNX Runtime, and listed in one table. Exit code 3
    if a file does not compute what its model computes.
    """
    from dsr_tool.compare.demo import run_demo
    from dsr_tool.compare.demo_document import demo_text
    from dsr_tool.errors import CheckFailed

    document = run_demo(
        output, epochs=epochs, seed=seed, force=force, quiet=quiet, notify=lambda line: note(line, quiet=quiet)
    )
    emit(document, demo_text(document), as_json=as_json)
    return 0 if all(row["verified"] for row in document["runs"]) else CheckFailed.exit_code
