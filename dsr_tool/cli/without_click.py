"""`dsr-tool predict` where click is not installed, with the arguments of `predict.py`; other commands need click."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from dsr_tool.cli import COMMANDS
from dsr_tool.cli.streams import write_result
from dsr_tool.errors import UsageError

__all__ = ["parser", "run"]

_NAME = "dsr-tool predict"


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are errors of dsr-tool."""

    def error(self, message: str) -> NoReturn:
        """Raises what is wrong as one sentence."""
        raise UsageError(f"{message}; see `{_NAME} --help`.")


def parser() -> argparse.ArgumentParser:
    """Returns the parser of `predict`; the tests compare it with click's."""
    made = _Parser(prog=_NAME, description=COMMANDS["predict"], allow_abbrev=False)
    made.add_argument("file", metavar="FILE", type=Path)
    made.add_argument("inputs", metavar="INPUTS", type=Path, nargs="+")
    made.add_argument("--runtime", default="sparse", help="sparse, scipy or onnxruntime.")
    made.add_argument(
        "--threads", type=_between(1, 256), help="Worker threads; default: 1, or every core with onnxruntime."
    )
    made.add_argument("--top", type=_between(1, sys.maxsize), default=5, help="Number of classes to print.")
    made.add_argument("--labels", type=Path, help="Text file with one class name per line.")
    made.add_argument("--json", dest="as_json", action="store_true", help="Print one JSON document on stdout.")
    made.add_argument("--quiet", "-q", action="store_true", help="Print only the result, no progress or notes.")
    return made


def run() -> int:
    """Reads the arguments of the process, and predicts. Returns the exit code.

    Raises:
        DsrError: the arguments are wrong, or the prediction fails.
    """
    # Options may stand between the inputs, as with click.
    given = parser().parse_intermixed_args(sys.argv[2:])
    from dsr_tool.report.prediction import prediction_document, prediction_text

    document = prediction_document(
        given.file, given.inputs, runtime=given.runtime, threads=given.threads, top=given.top, labels=given.labels
    )
    write_result(document, prediction_text(document), as_json=given.as_json, stdout=sys.stdout)
    return 0


def _between(least: int, largest: int) -> Callable[[str], int]:
    """Returns a function that reads a whole number in [least, largest]."""

    def read(text: str) -> int:
        number = int(text)
        if not least <= number <= largest:
            raise argparse.ArgumentTypeError(f"{number} is not in [{least}, {largest}]")
        return number

    read.__name__ = "whole number"  # in argparse's message for a text that is none
    return read
