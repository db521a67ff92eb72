"""What all commands share: --json and --quiet, how results leave, and examples in the help."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import click

__all__ = ["emit", "examples", "model_option", "note", "output_options", "result_options"]

_STDOUT = "dsr_tool.cli.stdout"
_QUIET = "Print the result alone: no progress, no notes."

F = TypeVar("F", bound=Callable[..., Any])


def output_options(function: F) -> F:
    """Add `--json` and `--quiet` to a command, as arguments `as_json` and `quiet`."""
    return _result(click.option("--quiet", "-q", is_flag=True, help=_QUIET)(function))


def result_options(function: F) -> F:
    """The same for a command that prints its result and nothing beside it: `--quiet` changes nothing."""
    return _result(click.option("--quiet", "-q", is_flag=True, expose_value=False, help=_QUIET)(function))


def model_option(function: F) -> F:
    """Add `--model` to a command that loads a model, as argument `maker`."""
    text = "For a network of your own: what makes it, as it was converted; no file may say which code to run."
    return click.option("--model", "maker", metavar="MODULE:CALLABLE", help=text)(function)


def _result(function: F) -> F:
    """Add `--json`, and keep stdout for what `emit` prints: a network of the user's own may print as it runs."""

    @functools.wraps(function)
    def run(*arguments: Any, **options: Any) -> Any:
        click.get_current_context().meta[_STDOUT] = sys.stdout
        with contextlib.redirect_stdout(sys.stderr):
            return function(*arguments, **options)

    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")(cast(F, run))


def examples(*lines: str) -> str:
    """An epilog with examples that can be copied as they stand."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def emit(document: Mapping[str, object], text: str, *, as_json: bool) -> None:
    """Print the result: the document, or the text for people."""
    stdout = click.get_current_context().meta[_STDOUT]
    click.echo(json.dumps(document, indent=1, allow_nan=False) if as_json else text, file=stdout)


def note(message: str, *, quiet: bool) -> None:
    """Say something beside the result."""
    if not quiet:
        click.echo(message, err=True)
