"""Shared by all commands: --json, --quiet and --model, output of the result, and examples in the help."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from dsr_tool.cli.streams import write_result

__all__ = [
    "FilePath",
    "TableOption",
    "emit",
    "examples",
    "model_option",
    "note",
    "output_options",
    "parse_shape",
    "result_options",
]

_STDOUT = "dsr_tool.cli.stdout"
"""Key of click's context under which the real stdout is kept."""
_QUIET_HELP = "Print only the result, no progress or notes."

F = TypeVar("F", bound=Callable[..., Any])


class FilePath(click.Path):
    """The path of a file or folder; an empty text, which `Path` takes for the current directory, is refused."""

    def __init__(self) -> None:
        """Makes the type; a command gets a `Path`."""
        super().__init__(path_type=Path)

    def convert(
        self, value: str | os.PathLike[str], parameter: click.Parameter | None, context: click.Context | None
    ) -> str | bytes | os.PathLike[str]:
        """Returns the path; raises `click.BadParameter` for an empty text, as of a shell's variable without a value."""
        if value == "":
            self.fail("'' is no path; give one, such as . for the current directory.", parameter, context)
        return super().convert(value, parameter, context)


class TableOption(click.Option):
    """An option whose help is read from a table when it is shown, so that other commands need not import the table."""

    def __init__(self, *arguments: Any, describe: Callable[[], str], **attributes: Any) -> None:
        """Makes the option.

        Args:
            arguments: as for `click.Option`.
            describe: returns the help.
            attributes: as for `click.Option`.
        """
        super().__init__(*arguments, **attributes)
        self._describe = describe

    def get_help_record(self, context: click.Context) -> tuple[str, str] | None:
        """Returns the option's names and its help."""
        self.help = self._describe()
        return super().get_help_record(context)


def output_options(function: F) -> F:
    """Adds `--json` and `--quiet` to a command, as arguments `as_json` and `quiet`."""
    return _add_json(click.option("--quiet", "-q", is_flag=True, help=_QUIET_HELP)(function))


def result_options(function: F) -> F:
    """Adds `--json` and `--quiet` to a command that prints only its result, so `--quiet` changes nothing."""
    return _add_json(click.option("--quiet", "-q", is_flag=True, expose_value=False, help=_QUIET_HELP)(function))


def model_option(function: F) -> F:
    """Adds `--model` to a command that loads a model, as argument `maker`."""
    # A file must never name code to run, so the user names it for every command.
    text = "Your own network: the callable that it was converted from."
    return click.option("--model", "maker", metavar="MODULE:CALLABLE", help=text)(function)


def _add_json(function: F) -> F:
    """Adds `--json`, and reserves stdout for `emit`: a user's network may print while it runs, which goes to stderr."""

    @functools.wraps(function)
    def run(*arguments: object, **options: object) -> object:
        click.get_current_context().meta[_STDOUT] = sys.stdout
        with contextlib.redirect_stdout(sys.stderr):
            return function(*arguments, **options)

    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")(cast(F, run))


def parse_shape(
    context: click.Context,  # noqa: ARG001 - click's signature
    parameter: click.Parameter,  # noqa: ARG001
    value: str | None,
) -> tuple[int, ...]:
    """Reads a shape that is written as 3,224,224; empty for an option that is not given."""
    try:
        return tuple(int(part) for part in value.split(",")) if value is not None else ()
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not a shape; write it as 3,224,224.") from error


def examples(*lines: str) -> str:
    """Returns an epilog with examples that can be copied as they are."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def emit(document: Mapping[str, object], text: str, *, as_json: bool) -> None:
    """Prints the result to stdout: the document as JSON, or the text."""
    write_result(document, text, as_json=as_json, stdout=click.get_current_context().meta[_STDOUT])


def note(message: str, *, quiet: bool) -> None:
    """Prints a line to stderr unless the user asked for quiet."""
    if not quiet:
        click.echo(message, file=sys.stderr)
