"""dsr-tool convert: convert a model to an exact sparse budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dsr_tool.cli.common import FilePath, emit, examples, note, output_options, parse_shape
from dsr_tool.cli.progress import progress_bar

__all__ = ["command"]


@click.command(
    "convert",
    epilog=examples(
        "dsr-tool convert resnet18 --num-classes 10 --input-size 32 --sparsity 0.9 -o resnet18-90",
        "dsr-tool convert mobilenet_v2 --weights DEFAULT --sparsity 0.5 --keep-dense 'classifier.*' -o mobilenet-50",
        "dsr-tool convert mobilenet_v2 --weights DEFAULT --sparsity 0.7 --calibrate photographs -o mobilenet-70",
        "dsr-tool convert resnet50 --weights DEFAULT --granularity 2:4 -o resnet50-24",
        "dsr-tool convert --recipe wrn-28-2/dsr@0.9 -o wrn-90",
        "dsr-tool convert mypackage.nets:small --input-shape 3,64,64 --sparsity 0.8 -o small-80",
        "dsr-tool convert wrn-28-2 --preset paper --sparsity 0.9 --thin -o wrn-thin",
    ),
)
@click.argument("arch", required=False)
@click.option("-o", "--output", required=True, type=FilePath(), help="The model folder to create.")
@click.option(
    "--recipe", metavar="NAME", help="Take options from a recipe: one that `dsr-tool recipes` lists, or a file."
)
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Change one value of the recipe; repeatable.")
@click.option(
    "--weights",
    help="torchvision enum name, or a checkpoint (.pth, .safetensors), or FILE#KEY for a part of one; absent: random.",
)
@click.option("--num-classes", type=int, help="Replace the classifier head by one with this many classes.")
@click.option("--input-size", type=int, help="Side of the square input in pixels; default: the architecture's.")
@click.option(
    "--input-shape",
    callback=parse_shape,
    metavar="C,H,W",
    help="Shape of one input instead, C,T,H,W for video; needed for module:callable.",
)
@click.option(
    "--sparsity",
    help="Fraction of zeros among the prunable weights, in [0, 1); or keep: the zeros that a pruned network has.",
)
@click.option(
    "--budget", help="Budget of the whole model instead: 5.1Mparams, 12MB or 12MiB (of its archive), or 0.8GMACs."
)
@click.option(
    "--distribution",
    help="uniform (default without weights), erk, lamp (default with weights), output (default with --calibrate), "
    "magnitude, or file:FILE.csv with a density for each layer.",
)
@click.option(
    "--calibrate",
    metavar="DIR",
    help="Photographs, unlabelled, to choose layer budgets, masks and values by, so that the outputs stay.",
)
@click.option("--calibration-images", type=int, metavar="N", help="Use at most N of them; default 256.")
@click.option("--allow-starved", is_flag=True, help="Convert even if a layer would carry no signal.")
@click.option(
    "--granularity",
    metavar="PATTERN",
    help="weight (default); kernel: a convolution kernel is active as a whole or not at all; fan-in: as many active "
    "weights in every output of a layer; or N:M, as 2:4: N of every M input channels, which needs no budget. With "
    "--sparsity keep: default, the pattern that the zeros have.",
)
@click.option("--keep-dense", multiple=True, metavar="PATTERN", help="Keep matching weights dense; repeatable.")
@click.option("--sparsify", multiple=True, metavar="PATTERN", help="Make matching weights sparse; repeatable.")
@click.option("--preset", help="paper: keep dense exactly what the DSR paper's code keeps dense.")
@click.option("--thin", is_flag=True, help="Make a dense model with fewer channels and as many parameters instead.")
@click.option(
    "--structure",
    metavar="FOLDER",
    help="Use the masks of this model or run folder of the same ARCH instead of a budget.",
)
@click.option(
    "--init",
    help="With --structure: fresh random weights (default), or the original ones, from before its conversion.",
)
@click.option(
    "--seed",
    type=int,
    help="Seed of random weights and positions; default 0, or with --structure another one than it had.",
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
    """Convert ARCH, or the architecture of a recipe, to a sparse model with masks.

    ARCH is a torchvision model for classification, segmentation, detection or video, a network of the papers
    (lenet-300-100, wrn-22-2 or wrn-28-2), or module:callable. The callable returns a torch.nn.Module; its module may
    be in the current directory.

    Weights are found by the type of their layer: convolutions, linear layers, embeddings and attention projections.
    Depthwise and tiny layers stay dense unless --sparsify names them, and so does a new head of trained weights. The
    number of active weights equals the target to the last weight.

    Trained weights: layers get their budgets by LAMP scores, and norms are corrected from the weights alone. With
    --calibrate, a folder of photographs keeps far more of what the network learned; the time depends on the network.
    """
    from converters.budgets import Fitted
    from converters.conversion import AUTO, convert
    from dsr_tool.errors import UsageError
    from dsr_tool.files import refuse_existing
    from dsr_tool.recipes.apply import resolve_conversion
    from dsr_tool.recipes.keys import to_parameters
    from dsr_tool.report.conversion import conversion_document, conversion_text

    # First of all, since a large model takes a while to convert.
    refuse_existing(output, force=force, marker="config.json")
    # Options that were not given must not replace those of the recipe. 0 is a value, though not always an allowed one.
    given = {"arch": arch, **options}.items()
    options = {key: value for key, value in given if value is not None and value is not False and value != ()}
    if recipe is not None:
        options = resolve_conversion(recipe, sets, options)
    elif sets:
        raise UsageError(f"--set {sets[0]!r} changes a recipe; give --recipe with it.")
    if "arch" not in options:
        raise UsageError("ARCH is missing; name the model to convert, or give --recipe.")
    fitted: list[Fitted] = []
    with progress_bar("calibrating", quiet=quiet or "calibrate" not in options) as on_progress:
        model = convert(**to_parameters(options), storage=AUTO, on_fitted=fitted.append, on_progress=on_progress)
    model.save(output, force=force)
    for warning in fitted[0].warnings:
        note(f"warning: {warning}", quiet=False)
    document = conversion_document(fitted[0], output)
    emit(document, conversion_text(document, short=quiet), as_json=as_json)
