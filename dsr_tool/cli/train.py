"""dsr-tool train: train a converted model at its exact budget."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import click

from dsr_tool.cli.common import TableOption, emit, examples, model_option, output_options
from dsr_tool.cli.ending import ended_by_sigterm
from dsr_tool.cli.method_help import MethodsCommand, lr_help, method_names, option_help, stop_help
from dsr_tool.cli.progress import show_on_terminal

__all__ = ["command"]


def _parse_numbers(
    context: click.Context,  # noqa: ARG001 - click's signature
    parameter: click.Parameter,  # noqa: ARG001
    value: str | None,
) -> tuple[float, ...] | None:
    try:
        return tuple(float(part) for part in value.split(",")) if value is not None else None
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not a list of numbers; write it as 60,120,160.") from error


def _parse_threshold(
    context: click.Context,  # noqa: ARG001 - click's signature
    parameter: click.Parameter,  # noqa: ARG001
    value: str | None,
) -> float | str | None:
    try:
        return value if value in (None, "auto") else float(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is neither a number nor auto; write it as 0.001.") from error


@click.command(
    "train",
    cls=MethodsCommand,
    epilog=examples(
        "dsr-tool train resnet18-90 -o run --data digits --epochs 10 --batch-size 64",
        "dsr-tool train resnet18-90 -o quick --data fake:256 --method static --epochs 1",
        "dsr-tool train lenet-99 --recipe lenet-300-100/dsr@0.99 --set epochs=10 --data mnist:mnist -o lenet-run",
    ),
)
@click.argument("model_dir", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The run folder to create.")
@click.option(
    "--data",
    required=True,
    metavar="SPEC",
    help="digits, mnist:ROOT, fashion-mnist:ROOT, cifar10:ROOT, cifar100:ROOT, images:ROOT (train/ and val/ class "
    "folders), arrays:FILE.npz (x_train, y_train, x_test, y_test) or fake:N.",
)
@click.option(
    "--recipe",
    metavar="NAME",
    help="Take all settings from a recipe: one that `dsr-tool recipes` lists, or a .toml file.",
)
@click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change one value of the recipe, or without a recipe any setting or option of the method; repeatable.",
)
@click.option("--method", cls=TableOption, describe=method_names)
@click.option("--epochs", type=int, help="Passes over the training images; default 30.")
@click.option("--batch-size", type=int, help="Images per optimizer step, of all processes together; default 128.")
@click.option(
    "--accumulate",
    type=int,
    help="Compute each batch in this many parts one after the other, to save memory; --batch-size images still make "
    "one step; default 1.",
)
@click.option("--lr", type=float, cls=TableOption, describe=lr_help)
@click.option("--schedule", help="cosine (default) or step.")
@click.option(
    "--milestones",
    callback=_parse_numbers,
    help="Epochs at which step lowers the learning rate, e.g. 60,120,160; default: at 30, 60 and 80 %.",
)
@click.option("--gamma", type=float, help="Factor at each milestone; default 0.2.")
@click.option("--warmup-epochs", type=float, help="Epochs of linear rise to the peak learning rate; default 0.")
@click.option("--optimizer", help="sgd (default), adam, adamw or rmsprop.")
@click.option("--momentum", type=float, help="Momentum of sgd (Nesterov) or rmsprop; default 0.9.")
@click.option("--weight-decay", type=float, help="L2 penalty on all parameters; default 0.0005.")
@click.option("--l1", type=float, help="L1 penalty on the weights of sparse layers; default 0.")
@click.option(
    "--values",
    help="fp32 (default), or int8, int6, int5, int4: train with weights rounded to so few bits, for an export with the "
    "same --values.",
)
@click.option("--label-smoothing", type=float, help="Fraction of each label spread over all classes; default 0.")
@click.option(
    "--class-weights",
    metavar="W",
    help="Factors on the loss of a training image by its class: none (default), balanced (all classes count alike), or "
    "a CSV file with columns class and weight.",
)
@click.option("--augment", help="none, shift, crop-flip or imagenet; default: what suits the data.")
@click.option("--device", help="auto (default), cpu or cuda.")
@click.option("--precision", help="fp32 (default), bf16 or fp16.")
@click.option(
    "--storage",
    help="How sparse weights are held: compact (values and positions), masked (dense, with zeros) or auto (default): "
    "compact where method, device and network allow it.",
)
@click.option("--compile", is_flag=True, default=None, help="Compile the model with torch.compile.")
@click.option("--workers", type=int, help="Processes that load images; default: 0 in memory, up to 4 on disk.")
@click.option("--seed", type=int, help="Seed of order, augmentation and random positions; default 0.")
@click.option("--every", type=int, help="Steps between updates of the method, at first; default: the method's.")
@click.option("--doubling", callback=_parse_numbers, help="Epochs at which --every doubles; default: the method's.")
@click.option("--stop", type=float, cls=TableOption, describe=stop_help)
@click.option(
    "--target",
    type=float,
    cls=TableOption,
    describe=option_help("target", "weights to move per update, a number or a fraction of the active ones"),
)
@click.option(
    "--tolerance", type=float, cls=TableOption, describe=option_help("tolerance", "accepted deviation from the target")
)
@click.option(
    "--threshold",
    callback=_parse_threshold,
    metavar="X",
    cls=TableOption,
    describe=option_help("threshold", "magnitude below which weights are pruned at first, or auto for a quantile"),
)
@click.option(
    "--drop-fraction",
    type=float,
    cls=TableOption,
    describe=option_help("drop_fraction", "fraction of each layer to move per update"),
)
@click.option(
    "--unit-threshold",
    type=float,
    cls=TableOption,
    describe=option_help("unit_threshold", "hidden units weaker than this fraction of their layer's mean are removed"),
)
@click.option(
    "--final-sparsity",
    cls=TableOption,
    describe=option_help("final_sparsity", "fraction of zeros at the end, or for tied 1 - values / weights"),
)
@click.option(
    "--fine-tune/--no-fine-tune",
    default=None,
    help="Take the defaults of a model that starts from trained weights, or the usual ones; default: those that fit.",
)
@click.option(
    "--teacher",
    metavar="PATH",
    help="Model folder, run folder or state_dict file of the same architecture, whose outputs are learned from.",
)
@click.option("--teacher-weight", type=float, help="Share of the loss that compares with the teacher; default 0.7.")
@click.option("--teacher-temperature", type=float, help="Divisor of both scores in that loss; default 2.")
@click.option(
    "--option",
    "method_options",
    multiple=True,
    metavar="KEY=VALUE",
    help="Any other option of the method, e.g. cross-layer=false (dsr) or temperature=1e-7 (deepr); repeatable.",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Resume the run in the output folder, bit for bit; without one, start from the beginning.",
)
@click.option(
    "--max-time",
    type=float,
    metavar="SECONDS",
    help="Stop after the last epoch that fits, to resume later; exit code 0, and finished is false in --json.",
)
@click.option("--force", is_flag=True, help="Replace an existing run folder.")
@model_option
@output_options
def command(
    model_dir: Path,
    output: Path,
    data: str,
    recipe: str | None,
    sets: tuple[str, ...],
    method_options: tuple[str, ...],
    maker: str | None,
    as_json: bool,
    quiet: bool,
    resume: bool,
    max_time: float | None,
    force: bool,
    **options: Any,
) -> None:
    """Train the model in MODEL_DIR at a constant number of active weights (methods gmp, granet and dst lower it).

    With the default method dsr, small weights are pruned and as many grow elsewhere, within and across layers. The run
    folder is a model folder too: it has the model of the last epoch, that of the best epoch in best/, and log.jsonl.

    A model that was converted from trained weights has defaults that keep what these learned: a lower learning rate,
    and methods that move fewer weights and stop earlier. What you give, and what a recipe says, always wins.

    A run that was interrupted in any way resumes after its last complete epoch when the same command is given with
    --resume; on the CPU it ends with the same bits as a run without interruption.

    On several processes: torchrun --nproc-per-node 2 --no-python dsr-tool train ...; they share each batch.
    """
    started = time.monotonic()  # --max-time includes the imports below, which take seconds
    context = click.get_current_context()
    if "RANK" in os.environ:  # started by torchrun, which ends all processes when it loses one, also in these imports
        context.with_resource(ended_by_sigterm())
    from converters.loading import load
    from dsr_tool.errors import UsageError
    from dsr_tool.recipes.apply import require_model, resolve_training, training_arguments
    from dsr_tool.report.bars import density_bars
    from dsr_tool.report.budget import check_trained, too_large
    from dsr_tool.report.training import training_document, training_text
    from dsr_tool.train import Follower, RunFolder, TrainSettings, joined, load_data, train_in_folder
    from dsr_tool.train.failures import require_classifier
    from dsr_tool.train.storage import storage_to_load

    given = {name: value for name, value in options.items() if value is not None}
    row = resolve_training(recipe, sets, given, method_options)
    arguments = training_arguments(row)
    settings = TrainSettings(**arguments)
    # Everything that can be refused is refused before model and data are read, which may take minutes.
    settings.check()
    if max_time is not None and not 0 < max_time < math.inf:
        raise UsageError(f"--max-time {max_time} is not allowed; give a positive number of seconds.")
    if settings.teacher is None and not resume and given.keys() & {"teacher_weight", "teacher_temperature"}:
        raise UsageError("--teacher-weight and --teacher-temperature go with --teacher; give that, or leave them out.")
    if resume and force:
        raise UsageError(f"--resume continues {str(output)!r} and --force replaces it; give one of the two.")
    if output.resolve() == model_dir.resolve():
        raise UsageError(f"--output {str(output)!r} is the model to train; give another folder.")
    ranks = context.with_resource(joined(settings.torch_device))
    # Before the model is loaded from it: a run folder is locked against other processes.
    run = RunFolder(output, force=force, resume=resume) if ranks.first else Follower(output, resume=resume)
    # A run that resumes knows its storage.
    storage = storage_to_load(run.stopped.started if run.stopped else settings)
    model = load(output if run.stopped else model_dir, maker, storage=storage)
    require_classifier(model.module)  # before the data, which does not fit a detector either
    images = load_data(data, model.config)
    facts = {"model": str(model_dir), "data": data}
    if not run.stopped:  # when it resumes, the run itself checks that model and data are the same
        require_model(row, model, str(model_dir))
    if recipe is not None:
        facts["recipe"] = row.name
        run.files["recipe.toml"] = row.to_toml()
    deadline = started + (max_time or math.inf)
    settings, result = train_in_folder(run, model, images, arguments, facts=facts, quiet=quiet, deadline=deadline)
    if not ranks.first:
        return
    show_on_terminal(density_bars(model.counts, model.sizes), quiet=quiet or as_json or not model.counts)
    check = check_trained(model)
    document = training_document(output, row.name or None, settings, result, model, check)
    emit(document, training_text(document), as_json=as_json)
    if check and not check.fits and document["finished"]:
        raise too_large(check, model, output)
