"""dsr-tool train: train a converted model at its exact budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dsr_tool.cli.common import emit, examples, model_option, output_options

__all__ = ["command"]


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
@click.option("--method", help="dsr (default), static, set, rigl or gmp.")
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
@click.option("--momentum", type=float, help="Of sgd (Nesterov) and rmsprop; default 0.9.")
@click.option("--weight-decay", type=float, help="On all parameters; default 0.0005.")
@click.option("--label-smoothing", type=float, help="Fraction of each label spread over all classes; default 0.")
@click.option("--augment", help="none, shift, crop-flip or imagenet; default: what suits the data.")
@click.option("--device", help="auto (default), cpu or cuda.")
@click.option("--precision", help="fp32 (default), bf16 or fp16.")
@click.option("--compile", is_flag=True, default=None, help="Run the model through torch.compile.")
@click.option("--workers", type=int, help="Processes that load images; default: none in memory, up to 4 on disk.")
@click.option("--seed", type=int, help="Of order, augmentation and positions; default 0.")
@click.option("--every", type=int, help="Steps between updates of the method (at first); default: the method's own.")
@click.option("--stop", type=float, help="Fraction of the training after which nothing moves; default 0.95 or 0.75.")
@click.option("--target", type=float, help="dsr: weights to move each time, a number or a fraction; default 0.15.")
@click.option("--tolerance", type=float, help="dsr: accepted deviation from the target; default 0.1.")
@click.option("--threshold", type=float, help="dsr: magnitude below which weights are dropped at first; default 0.001.")
@click.option("--drop-fraction", type=float, help="set, rigl: share of a layer to move; default 0.14, 0.3 (decaying).")
@click.option("--final-sparsity", help="gmp: fraction of zeros at the end; the model starts with sparsity 0.")
@click.option(
    "--resume",
    is_flag=True,
    help="Go on where the run in the output folder stopped, bit for bit; from the start where there is none.",
)
@click.option("--force", is_flag=True, help="Replace an existing run folder.")
@model_option
@output_options
def command(
    model_dir: Path,
    output: Path,
    data: str,
    maker: str | None,
    as_json: bool,
    quiet: bool,
    resume: bool,
    force: bool,
    **options: Any,
) -> None:
    """Train the model in MODEL_DIR; the number of active weights stays the same at every step (gmp: falls to its end).

    With method dsr, weights move: small ones are dropped and as many grow elsewhere, within and across layers. The
    run folder is a model folder too, holding the last epoch's state, with the best epoch's in best/ and a log.jsonl.

    A run that was stopped, however that happened, goes on after its last complete epoch when the same command is given
    with --resume; on the CPU it ends in exactly the state that it would have reached without the stop.
    """
    from converters.convert import load
    from dsr_tool.errors import UsageError
    from dsr_tool.methods import OPTIONS
    from dsr_tool.report.budget import check_trained, too_large
    from dsr_tool.train import Progress, RunFolder, TrainResult, TrainSettings, load_data, train

    own = {name: options.pop(name) for name in sorted({name for names in OPTIONS.values() for name in names})}
    if any(value is not None for value in own.values()):
        options["options"] = {name: value for name, value in own.items() if value is not None}
    given = {name: value for name, value in options.items() if value is not None}
    TrainSettings(**given).check()
    if resume and force:
        raise UsageError(f"--resume goes on with {str(output)!r} and --force replaces it; give one of the two.")
    if output.resolve() == model_dir.resolve():
        raise UsageError(f"--output {str(output)!r} is the model to train; give another folder.")
    run = RunFolder(output, force=force, resume=resume)
    stopped = run.stopped
    model = load(output if stopped else model_dir, maker)
    images = load_data(data, model.config)
    settings = (stopped.settings(given) if stopped else TrainSettings(**given)).resolve(images.dataset.augment)
    run.facts = {"model": str(model_dir), "data": data, **images.sizes, "settings": settings.to_dict()}
    before = stopped.epochs if stopped else ()
    with run, Progress(settings.epochs, done=len(before), quiet=quiet) as progress:
        result = train(model, images, settings, [run, progress], state=stopped.state if stopped else None)
    result = TrainResult((*before, *result.epochs))
    check = check_trained(model)
    document = {
        "schema": "dsr-tool/train/1",
        "run": str(output),
        "method": settings.method,
        "epochs": settings.epochs,
        "steps": result.last.step,
        "time_s": round(sum(record.time_s for record in result.epochs), 3),
        "last": {"test_accuracy": result.last.test_accuracy, "test_loss": result.last.test_loss},
        "best": {"epoch": result.best.epoch, "test_accuracy": result.best.test_accuracy},
        "active_weights": model.active_weights,
        "prunable_weights": model.prunable_weights,
        "parameters": model.parameters,
        "sparsity": model.sparsity,
        "model_sparsity": model.model_sparsity,
        "budget": check.to_dict() if check else None,
    }
    emit(document, _text(document), as_json=as_json)
    if check and not check.fits:
        raise too_large(check, model, output)


def _text(document: dict[str, Any]) -> str:
    best = document["best"]
    return (
        f"{document['run']}: test accuracy {document['last']['test_accuracy']:.4f} "
        f"(best {best['test_accuracy']:.4f} in epoch {best['epoch']}), {document['active_weights']:,} active weights "
        f"of {document['prunable_weights']:,} ({document['sparsity']:.2%} zeros), {document['time_s']:.0f} s"
        + (f"\n{document['budget']['line']}" if document["budget"] else "")
    )
