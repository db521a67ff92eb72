"""dsr-tool train: train a converted model at its exact budget."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsr_tool.cli.common import FilePath, emit, examples, model_option, note, output_options
from dsr_tool.cli.ending import ended_by_sigterm
from dsr_tool.cli.method_help import MethodsCommand
from dsr_tool.cli.progress import show_on_terminal
from dsr_tool.cli.training_options import training_options

if TYPE_CHECKING:
    from dsr_tool.recipes.config_file import Config

__all__ = ["command"]


@click.command(
    "train",
    cls=MethodsCommand,
    epilog=examples(
        "dsr-tool train resnet18-90 -o run --data digits --epochs 10 --batch-size 64",
        "dsr-tool train resnet18-90 -o quick --data fake:256 --method static --epochs 1",
        "dsr-tool train --config quick/settings.json --epochs 2 -o again",
        "dsr-tool train lenet-99 --recipe lenet-300-100/dsr@0.99 --set epochs=10 --data mnist:mnist -o lenet-run",
    ),
)
@click.argument("model_dir", required=False, type=FilePath())
@click.option("-o", "--output", required=True, type=FilePath(), help="The run folder to create.")
@click.option(
    "--data",
    metavar="SPEC",
    help="digits, mnist:ROOT, fashion-mnist:ROOT, cifar10:ROOT, cifar100:ROOT, images:ROOT (train/ and val/ class "
    "folders), arrays:FILE.npz (x_train, y_train, x_test, y_test), fake:N, or module:callable that returns torch "
    "Datasets to train on and to test on.",
)
@click.option(
    "--config",
    metavar="FILE",
    type=FilePath(),
    help="Take model, data and all settings from a file, .json or .toml, such as the settings.json of a run folder; "
    "what the command line gives wins.",
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
@training_options
@click.option(
    "--log", metavar="tensorboard", help="Also write the figures of each epoch for TensorBoard, to RUN/tensorboard."
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
    model_dir: Path | None,
    output: Path,
    data: str | None,
    config: Path | None,
    recipe: str | None,
    sets: tuple[str, ...],
    method_options: tuple[str, ...],
    maker: str | None,
    as_json: bool,
    quiet: bool,
    log: str | None,
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

    The settings.json of a run folder repeats it: dsr-tool train --config RUN/settings.json -o AGAIN.

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
    from dsr_tool.train.event_log import require_log
    from dsr_tool.train.failures import require_classifier
    from dsr_tool.train.storage import storage_to_load

    given = {name: value for name, value in options.items() if value is not None}
    file = None if config is None else _read_config(config, recipe, model_dir, data)
    model_dir, data, log = _places(file, model_dir, data, log)
    base = None if file is None else file.for_method(given.get("method"))
    row = resolve_training(recipe, sets, given, method_options, base=base)
    arguments = training_arguments(row)
    settings = TrainSettings(**arguments)
    # Everything that can be refused is refused before model and data are read, which may take minutes.
    settings.check()
    require_log(log)
    if settings.teacher is None and not resume and given.keys() & {"teacher_weight", "teacher_temperature"}:
        raise UsageError("--teacher-weight and --teacher-temperature go with --teacher; give that, or leave them out.")
    _refuse_contradictions(output, model_dir, max_time, resume=resume, force=force)
    ranks = context.with_resource(joined(settings.torch_device))
    changes = "" if file is None else file.changes(row, {"model": str(model_dir), "data": data, "log": log})
    note(changes, quiet=quiet or not (ranks.first and changes))
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
    settings, result = train_in_folder(
        run, model, images, arguments, facts=facts, log=log, quiet=quiet, deadline=deadline
    )
    if not ranks.first:
        return
    show_on_terminal(density_bars(model.counts, model.sizes), quiet=quiet or as_json or not model.counts)
    check = check_trained(model)
    document = training_document(output, row.name or None, settings, result, model, check)
    emit(document, training_text(document), as_json=as_json)
    if check and not check.fits and document["finished"]:
        raise too_large(check, model, output)


def _read_config(path: Path, recipe: str | None, model: Path | None, data: str | None) -> Config:
    from dsr_tool.errors import UsageError
    from dsr_tool.recipes.config_file import read_config

    if recipe is not None:
        raise UsageError("--config and --recipe both give all settings; give one of the two.")
    return read_config(path, {"model": model, "data": data})


def _places(
    config: Config | None, model: Path | None, data: str | None, log: str | None
) -> tuple[Path, str, str | None]:
    """Returns model, data and log: those of the command line, else those of the file of `--config`."""
    from dsr_tool.errors import UsageError

    if config is not None:
        # An empty text of the command line is not absent: it is refused like any other value that is none.
        model = Path(config.model) if model is None and config.model is not None else model
        data, log = config.data if data is None else data, config.log if log is None else log
    if model is None or data is None:
        missing = " and ".join(name for name, value in (("MODEL_DIR", model), ("--data", data)) if value is None)
        raise UsageError(
            f"{missing} must be given, or --config with a file that has them; see `dsr-tool train --help`."
        )
    return model, data, log


def _refuse_contradictions(output: Path, model: Path, max_time: float | None, *, resume: bool, force: bool) -> None:
    """Raises `UsageError` if there is no time, the run folder is the model, or options contradict each other."""
    from dsr_tool.errors import UsageError

    if max_time is not None and not 0 < max_time < math.inf:
        raise UsageError(f"--max-time {max_time} is not allowed; give a positive number of seconds.")
    if resume and force:
        raise UsageError(f"--resume continues {str(output)!r} and --force replaces it; give one of the two.")
    if output.resolve() == model.resolve():
        raise UsageError(f"--output {str(output)!r} is the model to train; give another folder.")
