"""Help on training methods, read from their table.

The table imports torch, so it is read only when help is shown: the other commands, and errors, need not wait for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import click

from dsr_tool.errors import join_words

if TYPE_CHECKING:
    from dsr_tool.methods import Method

__all__ = ["MethodsCommand", "lr_help", "method_names", "option_help", "stop_help"]


class MethodsCommand(click.Command):
    """A command whose help ends with a section on every method: its summary, its options and their defaults."""

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the options of the command, and the methods."""
        super().format_options(context, formatter)
        # Here, not above: the module is imported by every run of the command.
        from dsr_tool.methods import METHODS

        with formatter.section("Methods"):
            formatter.write_dl([(name, _method_help(row)) for name, row in METHODS.items()])


def method_names() -> str:
    """Returns the help of `--method`."""
    from dsr_tool.methods import METHODS

    first, *others = METHODS
    return f"{first} (default), {', '.join(others)}, or a plugin method; see Methods below."


def option_help(option: str, text: str) -> Callable[[], str]:
    """Returns the help of an option of methods: the methods that have it, `text`, and its defaults."""

    def describe() -> str:
        from dsr_tool.methods import METHODS

        defaults = {
            name: row.option_defaults()[option] for name, row in METHODS.items() if option in row.option_defaults()
        }
        tuned = {name: row.fine_tuning[option] for name, row in METHODS.items() if option in row.fine_tuning}
        return f"{', '.join(defaults)}: {text}{_defaults(defaults)}{_defaults(tuned, 'from trained weights')}."

    return describe


def stop_help() -> str:
    """Returns the help of `--stop`, with the default of each method that has a schedule."""
    from dsr_tool.methods import METHODS

    length = 10_000  # a multiple of what schedules divide by, so that no stop is rounded
    schedules = {name: row.default_schedule({"total_steps": length, "every": None}) for name, row in METHODS.items()}
    stops: dict[str, object] = {
        name: schedule.stop / length for name, schedule in schedules.items() if schedule is not None
    }
    tuned = {name: row.fine_tuning["stop"] for name, row in METHODS.items() if "stop" in row.fine_tuning}
    # The others, such as gmp, have one default for all models.
    named = _defaults(tuned, f"from trained weights, for {join_words(list(tuned), 'and')}")
    return f"Fraction of the training after which nothing is pruned or grown{_defaults(stops)}{named}."


def lr_help() -> str:
    """Returns the help of `--lr`, with the default of each optimizer."""
    from dsr_tool.train.settings import FINE_TUNING_RATES, LEARNING_RATES

    usual, tuned = (
        f"{rates['sgd']:g} for sgd, {rates['adam']:g} for the others" for rates in (LEARNING_RATES, FINE_TUNING_RATES)
    )
    return f"Peak learning rate; default {usual}; from trained weights {tuned}."


def _defaults(values: Mapping[str, object], when: str = "default") -> str:
    """Returns "; default 0.95, for rigl, gmp and dst 0.75" for values by name; empty if there is no default."""
    # None means that there is no default, as for a final sparsity, which must be given.
    given = {name: value for name, value in values.items() if value is not None}
    if not given:
        return ""
    ranked = [value for value, _ in Counter(given.values()).most_common()]
    others = [
        f", for {join_words([name for name, own in given.items() if own == value], 'and')} {_format(value)}"
        for value in ranked[1:]
    ]
    return f"; {when} {_format(ranked[0])}{''.join(others)}"


def _method_help(row: type[Method]) -> str:
    """Returns a method's summary, its options with defaults, and whether it needs a dense model."""
    options = [name if value is None else f"{name}={_format(value)}" for name, value in row.option_defaults().items()]
    listed = f" Options: {', '.join(options)}." if options else ""
    dense = " Starts from --sparsity 0." if row.starts_dense else ""
    return f"{row.summary}.{listed}{dense}"


def _format(value: object) -> str:
    """Returns a default as it is written on the command line."""
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
