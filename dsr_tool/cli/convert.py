"""dsr-tool convert: a torchvision model, a paper's, or one of your own, to an exact sparse budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dsr_tool.cli.common import emit, examples, output_options

__all__ = ["command"]


def _shape(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...]:  # noqa: ARG001
    try:
        return tuple(int(part) for part in value.split(",")) if value is not None else ()
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not a shape; write it as 3,224,224.") from error


@click.command(
    "convert",
    epilog=examples(
        "dsr-tool convert resnet18 --num-classes 10 --input-size 32 --sparsity 0.9 -o resnet18-90",
        "dsr-tool convert mobilenet_v2 --weights DEFAULT --sparsity 0.5 --keep-dense 'classifier.*' -o mobilenet-50",
        "dsr-tool convert --recipe wrn-28-2/dsr@0.9 -o wrn-90",
        "dsr-tool convert mypackage.nets:small --input-shape 3,64,64 --sparsity 0.8 -o small-80",
        "dsr-tool convert wrn-28-2 --preset paper --sparsity 0.9 --thin -o wrn-thin",
    ),
)
@click.argument("arch", required=False)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The model folder to make.")
@click.option(
    "--recipe", metavar="NAME", help="Convert as a recipe says: one that `dsr-tool recipes` lists, or a file."
)
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Change one value of the recipe; repeatable.")
@click.option("--weights", help="torchvision enum name, or a state_dict file (.pth, .safetensors); absent: random.")
@click.option("--num-classes", type=int, help="A new classifier head of so many classes.")
@click.option("--input-size", type=int, help="Side of the square input in pixels; default: the architecture's.")
@click.option(
    "--input-shape",
    callback=_shape,
    metavar="C,H,W",
    help="Instead: the whole shape of one input; C,T,H,W for video; needed for module:callable.",
)
@click.option("--sparsity", help="Fraction of zeros among the prunable weights, in [0, 1).")
@click.option("--budget", help="Instead, of the whole model: 5.1Mparams, 12MB, 12MiB (of its archive) or 0.8GMACs.")
@click.option("--distribution", help="uniform (default without weights), erk, or magnitude (default with weights).")
@click.option("--granularity", help="weight (default), or kernel: whole kernels of convolutions are active or not.")
@click.option("--keep-dense", multiple=True, metavar="PATTERN", help="Keep these weights dense; repeatable.")
@click.option("--sparsify", multiple=True, metavar="PATTERN", help="Make these weights sparse; repeatable.")
@click.option("--preset", help="paper: keep dense what the DSR paper's code kept dense, and nothing else.")
@click.option("--thin", is_flag=True, help="A dense model with fewer channels, which has as many parameters instead.")
@click.option(
    "--structure",
    metavar="FOLDER",
    help="Instead of a budget: take exactly the masks of this model or run folder of the same ARCH.",
)
@click.option(
    "--init",
    help="With --structure: fresh random weights (default), or original, those that its model had before conversion.",
)
@click.option(
    "--seed",
    type=int,
    help="Of random weights and positions; default 0, or with --structure another than it had.",
)
@click.option("--force", is_flag=True, help="Replace an existing output.")
@output_options
def command(
    arch: str | None,
    output: Path,
    recipe: str | None,
    sets: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    force: bool,
    **options: Any,
) -> None:
    """Convert ARCH, or what a recipe names, to masked sparse form.

    ARCH is a torchvision model for classification, segmentation or video, a network of the papers (lenet-300-100,
    wrn-22-2 or wrn-28-2), or module:callable, which returns a torch.nn.Module and may lie in the current directory.

    Weights are found by the type of their layer: convolutions, linear layers, embeddings and attention
    projections. Depthwise and tiny layers stay dense unless --sparsify names them. The number of active weights
    equals the target to the last weight.
    """
    from converters.budgets import Fitted
    from converters.conversion import convert
    from dsr_tool.errors import UsageError
    from dsr_tool.files import refuse_existing
    from dsr_tool.report.conversion import conversion_document, conversion_text

    refuse_existing(output, force=force, marker="config.json")
    if recipe is not None:
        from dsr_tool.recipes.apply import conversion

        said = {"arch": arch, **options}
        given = {key: value for key, value in said.items() if value is not None and value is not False and value != ()}
        options = {**options, **conversion(recipe, sets, given)}
        arch = options.pop("arch", None)
    elif sets:
        raise UsageError(f"--set {sets[0]!r} changes a recipe; give --recipe with it.")
    if arch is None:
        raise UsageError("ARCH is missing; name the model to convert, or give --recipe.")
    reached: list[Fitted] = []
    model = convert(arch, sparsify_patterns=options.pop("sparsify"), on_fitted=reached.append, **options)
    model.save(output, force=force)
    document = conversion_document(reached[0], output)
    emit(document, conversion_text(document, short=quiet), as_json=as_json)
