"""dsr-tool convert: a torchvision model to an exact sparse budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dsr_tool.cli.common import emit, examples, output_options

__all__ = ["command"]


@click.command(
    "convert",
    epilog=examples(
        "dsr-tool convert resnet18 --num-classes 10 --input-size 32 --sparsity 0.9 -o resnet18-90",
        "dsr-tool convert mobilenet_v2 --weights DEFAULT --sparsity 0.5 --keep-dense 'classifier.*' -o mobilenet-50",
    ),
)
@click.argument("arch")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The model folder to make.")
@click.option("--weights", help="torchvision enum name, or a state_dict file (.pth, .safetensors); absent: random.")
@click.option("--num-classes", type=int, help="A new classifier head of so many classes.")
@click.option("--input-size", type=int, help="Side of the square input in pixels; default: the architecture's.")
@click.option("--sparsity", help="Fraction of zeros among the prunable weights, in [0, 1).")
@click.option("--budget", help="Instead: non-zero parameters of the whole model, such as 5.1Mparams.")
@click.option("--distribution", help="uniform (default without weights), erk, or magnitude (default with weights).")
@click.option("--keep-dense", multiple=True, metavar="PATTERN", help="Keep these weights dense; repeatable.")
@click.option("--sparsify", multiple=True, metavar="PATTERN", help="Make these weights sparse; repeatable.")
@click.option("--preset", help="paper: keep dense what the DSR paper's code kept dense, and nothing else.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of random weights and positions.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@output_options
def command(arch: str, output: Path, as_json: bool, quiet: bool, force: bool, **options: Any) -> None:
    """Convert ARCH, a torchvision classification model, to masked sparse form.

    Weights are found by the type of their layer: convolutions, linear layers, embeddings and attention
    projections. Depthwise and tiny layers stay dense unless --sparsify names them. The number of active weights
    equals the target to the last weight.
    """
    from converters.convert import convert
    from dsr_tool.core.files import refuse_existing
    from dsr_tool.report.convert import conversion_document, conversion_text

    refuse_existing(output, force=force, marker="config.json")
    model = convert(arch, sparsify_patterns=options.pop("sparsify"), **options)
    model.save(output, force=force)
    document = conversion_document(model, output)
    emit(document, conversion_text(document, short=quiet), as_json=as_json)
