"""The options of `dsr-tool train` that are settings of a training, or options of its method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from dsr_tool.cli.common import TableOption
from dsr_tool.cli.method_help import lr_help, method_names, option_help, stop_help

__all__ = ["training_options"]

F = TypeVar("F", bound=Callable[..., Any])


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


def _of_method(flag: str, what: str, **more: Any) -> Callable[[F], F]:
    """Returns an option of methods, whose help names the methods that have it, and their defaults."""
    return click.option(flag, cls=TableOption, describe=option_help(flag[2:].replace("-", "_"), what), **more)


_OPTIONS = (
    click.option("--method", cls=TableOption, describe=method_names),
    click.option("--epochs", type=int, help="Passes over the training images; default 30."),
    click.option("--batch-size", type=int, help="Images per optimizer step, of all processes together; default 128."),
    click.option(
        "--accumulate",
        type=int,
        help="Compute each batch in this many parts one after the other, to save memory; --batch-size images still "
        "make one step; default 1.",
    ),
    click.option("--lr", type=float, cls=TableOption, describe=lr_help),
    click.option("--schedule", help="cosine (default) or step."),
    click.option(
        "--milestones",
        callback=_parse_numbers,
        help="Epochs at which step lowers the learning rate, e.g. 60,120,160; default: at 30, 60 and 80 %.",
    ),
    click.option("--gamma", type=float, help="Factor at each milestone; default 0.2."),
    click.option("--warmup-epochs", type=float, help="Epochs of linear rise to the peak learning rate; default 0."),
    click.option("--optimizer", help="sgd (default), adam, adamw or rmsprop."),
    click.option("--momentum", type=float, help="Momentum of sgd (Nesterov) or rmsprop; default 0.9."),
    click.option("--weight-decay", type=float, help="L2 penalty on all parameters; default 0.0005."),
    click.option("--l1", type=float, help="L1 penalty on the weights of sparse layers; default 0."),
    click.option(
        "--values",
        help="fp32 (default), or int8, int6, int5, int4: train with weights rounded to so few bits, for an export with "
        "the same --values.",
    ),
    click.option("--label-smoothing", type=float, help="Fraction of each label spread over all classes; default 0."),
    click.option(
        "--class-weights",
        metavar="W",
        help="Factors on the loss of a training image by its class: none (default), balanced (all classes count "
        "alike), or a CSV file with columns class and weight.",
    ),
    click.option("--augment", help="none, shift, crop-flip or imagenet; default: what suits the data."),
    click.option("--device", help="auto (default), cpu or cuda."),
    click.option("--precision", help="fp32 (default), bf16 or fp16."),
    click.option(
        "--storage",
        help="How sparse weights are held: compact (values and positions), masked (dense, with zeros) or auto "
        "(default): compact where method, device and network allow it.",
    ),
    click.option("--compile", is_flag=True, default=None, help="Compile the model with torch.compile."),
    click.option("--workers", type=int, help="Processes that load images; default: 0 in memory, up to 4 on disk."),
    click.option("--seed", type=int, help="Seed of order, augmentation and random positions; default 0."),
    click.option("--every", type=int, help="Steps between updates of the method, at first; default: the method's."),
    click.option("--doubling", callback=_parse_numbers, help="Epochs at which --every doubles; default: the method's."),
    click.option("--stop", type=float, cls=TableOption, describe=stop_help),
    _of_method("--target", "weights to move per update, a number or a fraction of the active ones", type=float),
    _of_method("--tolerance", "accepted deviation from the target", type=float),
    _of_method(
        "--threshold",
        "magnitude below which weights are pruned at first, or auto for a quantile",
        callback=_parse_threshold,
        metavar="X",
    ),
    _of_method("--drop-fraction", "fraction of each layer to move per update", type=float),
    _of_method(
        "--unit-threshold", "hidden units weaker than this fraction of their layer's mean are removed", type=float
    ),
    _of_method("--final-sparsity", "fraction of zeros at the end, or for tied 1 - values / weights"),
    click.option(
        "--fine-tune/--no-fine-tune",
        default=None,
        help="Take the defaults of a model that starts from trained weights, or the usual ones; default: those that "
        "fit.",
    ),
    click.option(
        "--teacher",
        metavar="PATH",
        help="Model folder, run folder or state_dict file of the same architecture, whose outputs are learned from.",
    ),
    click.option("--teacher-weight", type=float, help="Share of the loss that compares with the teacher; default 0.7."),
    click.option("--teacher-temperature", type=float, help="Divisor of both scores in that loss; default 2."),
    click.option(
        "--option",
        "method_options",
        multiple=True,
        metavar="KEY=VALUE",
        help="Any other option of the method, e.g. cross-layer=false (dsr) or temperature=1e-7 (deepr); repeatable.",
    ),
)
"""In the order of the help."""


def training_options(function: F) -> F:
    """Adds the options to a command, as arguments of their names; None for each that is not given."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function
