"""dsr-tool train: train a converted model at its exact budget."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from dsr_tool.cli.common import emit, examples, model_option, output_options

__all__ = ["command"]

_PAUSED = (
    "paused after epoch {last[epoch]} of {epochs}, as --max-time says; give the same command with --resume to go on"
)


def _numbers(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[float, ...] | None:  # noqa: ARG001
    try:
        return tuple(float(part) for part in value.split(",")) if value is not None else None
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not a list of numbers; write it as 60,120,160.") from error


@click.command(
    "train",
    epilog=examples(
        "dsr-tool train resnet18-90 -o run --data digits --epochs 10 --batch-size 64",
        "dsr-tool train resnet18-90 -o quick --data fake:256 --method static --epochs 1",
        "dsr-tool train lenet-99 --recipe lenet-300-100/dsr@0.99 --set epochs=10 --data mnist:mnist -o lenet-run",
    ),
)
@click.argument("model_dir", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The run folder to make.")
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
    help="Change one value of the recipe, or any setting or option of the method without one; repeatable.",
)
@click.option(
    "--method", help="dsr (default), static, dense, set, deepr, rigl, gmp, dst, tied, neuron-set, or one installed."
)
@click.option("--epochs", type=int, help="Passes over the training images; default 30.")
@click.option("--batch-size", type=int, help="Images per step; default 128.")
@click.option("--lr", type=float, help="Peak learning rate; default 0.1 for sgd, 0.001 for the others.")
@click.option("--schedule", help="cosine (default) or step.")
@click.option(
    "--milestones",
    callback=_numbers,
    help="Epochs at which step lowers the rate, such as 60,120,160; default: at 30, 60 and 80 %.",
)
@click.option("--gamma", type=float, help="Factor of each of these; default 0.2.")
@click.option("--warmup-epochs", type=float, help="Epochs of linear rise to the peak; default 0.")
@click.option("--optimizer", help="sgd (default), adam, adamw or rmsprop.")
@click.option("--momentum", type=float, help="Of sgd (Nesterov) and rmsprop, the others have none; default 0.9.")
@click.option("--weight-decay", type=float, help="On all parameters; default 0.0005.")
@click.option("--label-smoothing", type=float, help="Fraction of each label spread over all classes; default 0.")
@click.option("--augment", help="none, shift, crop-flip or imagenet; default: what suits the data.")
@click.option("--device", help="auto (default), cpu or cuda.")
@click.option("--precision", help="fp32 (default), bf16 or fp16.")
@click.option("--compile", is_flag=True, default=None, help="Run the model through torch.compile.")
@click.option("--workers", type=int, help="Processes that load images; default: none in memory, up to 4 on disk.")
@click.option("--seed", type=int, help="Of order, augmentation and positions; default 0.")
@click.option("--every", type=int, help="Steps between updates of the method (at first); default: the method's own.")
@click.option("--doubling", callback=_numbers, help="Epochs at which --every doubles; default: the method's own.")
@click.option(
    "--stop",
    type=float,
    help="Fraction of the training after which nothing moves; default 0.95, for rigl, gmp and dst 0.75.",
)
@click.option("--target", type=float, help="dsr: weights to move each time, a number or a fraction; default 0.15.")
@click.option("--tolerance", type=float, help="dsr: accepted deviation from the target; default 0.1.")
@click.option("--threshold", type=float, help="dsr: magnitude below which weights are dropped at first; default 0.001.")
@click.option(
    "--drop-fraction",
    type=float,
    help="set, neuron-set, rigl: share of a layer to move; default 0.14, rigl 0.3 (decaying).",
)
@click.option(
    "--unit-threshold",
    type=float,
    help="neuron-set: hidden units weaker than this share of their layer's mean are removed; default 0.5.",
)
@click.option(
    "--final-sparsity",
    help="gmp, dst: fraction of zeros at the end, of a model that starts with sparsity 0; tied: 1 - values / weights.",
)
@click.option(
    "--option",
    "own",
    multiple=True,
    metavar="KEY=VALUE",
    help="Any other option of the method, such as cross-layer=false (dsr) or temperature=1e-5 (deepr); repeatable.",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Go on where the run in the output folder stopped, bit for bit; from the start where there is none.",
)
@click.option(
    "--max-time",
    type=float,
    metavar="SECONDS",
    help="Stop after the last epoch that fits, to go on with --resume; exit code 0, and finished is false in --json.",
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
    own: tuple[str, ...],
    maker: str | None,
    as_json: bool,
    quiet: bool,
    resume: bool,
    max_time: float | None,
    force: bool,
    **options: Any,
) -> None:
    """Train the model in MODEL_DIR; the number of active weights stays the same at every step (gmp, dst: falls).

    With method dsr, weights move: small ones are dropped and as many grow elsewhere, within and across layers. The
    run folder is a model folder too, holding the last epoch's state, with the best epoch's in best/ and a log.jsonl.

    A run that was stopped, however that happened, goes on after its last complete epoch when the same command is given
    with --resume; on the CPU it ends in exactly the state that it would have reached without the stop.

    On several processes: torchrun --nproc-per-node 2 --no-python dsr-tool train ...; the batch is shared out.
    """
    started = time.monotonic()
    from converters.conversion import load
    from dsr_tool.errors import UsageError
    from dsr_tool.recipes.apply import as_run, own_options, require_model, settings
    from dsr_tool.report.budget import check_trained, too_large
    from dsr_tool.train import Follower, Progress, RunFolder, TrainResult, TrainSettings, joined, load_data, train

    told = as_run(recipe, sets, {name: value for name, value in options.items() if value is not None})
    told = replace(told, options={**told.options, **own_options(own)})
    given = settings(told)
    TrainSettings(**given).check()
    if max_time is not None and not 0 < max_time < math.inf:
        raise UsageError(f"--max-time {max_time} is not allowed; give a positive number of seconds.")
    if resume and force:
        raise UsageError(f"--resume goes on with {str(output)!r} and --force replaces it; give one of the two.")
    if output.resolve() == model_dir.resolve():
        raise UsageError(f"--output {str(output)!r} is the model to train; give another folder.")
    ranks = click.get_current_context().with_resource(joined(TrainSettings(**given).torch_device))
    run = RunFolder(output, force=force, resume=resume) if ranks.first else Follower(output, resume=resume)
    stopped = run.stopped
    model = load(output if stopped else model_dir, maker)
    images = load_data(data, model.config)
    if not stopped:
        require_model(told, model, str(model_dir))
    plan = (stopped.settings(given) if stopped else TrainSettings(**given)).resolve(images.dataset.augment)
    plan.require_update(plan.epochs * images.steps(plan.batch_size))
    run.facts = {"model": str(model_dir), "data": data, **images.sizes, "settings": plan.to_dict()}
    if recipe is not None:
        run.facts["recipe"] = told.name
        run.files["recipe.toml"] = told.to_toml()
    before = stopped.epochs if stopped else ()
    ranks.wait()  # until all have read what rank 0 changes from here on
    with run, Progress(plan.epochs, done=len(before), quiet=quiet) as progress:
        state = stopped.state if stopped else None
        result = train(model, images, plan, [run, progress], state=state, deadline=started + (max_time or math.inf))
    result = TrainResult((*before, *result.epochs))
    if not ranks.first:
        return
    check = check_trained(model)
    document = {
        "schema": "dsr-tool/train/1",
        "run": str(output),
        "method": plan.method,
        "recipe": told.name or None,
        "epochs": plan.epochs,
        "finished": result.last.epoch == plan.epochs,
        "steps": result.last.step,
        "time_s": round(sum(record.time_s for record in result.epochs), 3),
        "last": {
            "epoch": result.last.epoch,
            "test_accuracy": result.last.test_accuracy,
            "test_loss": result.last.test_loss,
        },
        "best": {"epoch": result.best.epoch, "test_accuracy": result.best.test_accuracy},
        "active_weights": model.active_weights,
        "prunable_weights": model.prunable_weights,
        "parameters": model.parameters,
        "sparsity": model.sparsity,
        "model_sparsity": model.model_sparsity,
        "budget": check.to_dict() if check else None,
    }
    emit(document, _text(document), as_json=as_json)
    if check and not check.fits and document["finished"]:
        raise too_large(check, model, output)


def _text(document: dict[str, Any]) -> str:
    best = document["best"]
    return (
        f"{document['run']}: test accuracy {document['last']['test_accuracy']:.4f} "
        f"(best {best['test_accuracy']:.4f} in epoch {best['epoch']}), {document['active_weights']:,} active weights "
        f"of {document['prunable_weights']:,} ({document['sparsity']:.2%} zeros), {document['time_s']:.0f} s"
        + (f"\n{document['budget']['line']}" if document["budget"] else "")
        + ("" if document["finished"] else f"\n{_PAUSED.format(**document)}")
    )
