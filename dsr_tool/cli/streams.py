"""Output in the encoding that stdout and stderr have: what it lacks is written in ASCII, never refused.

A pipe on Windows has the code page of the system, and a container without a locale has ASCII. Names of files may hold
bytes that no encoding has.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from dsr_tool.errors import FileError

__all__ = ["write_anything", "write_result"]

_HANDLER = "dsr_tool.ascii"
_STAND_INS = str.maketrans(
    {
        **dict.fromkeys("\u2500\u2501\u2550\u2574\u2576\u2578\u257a", "-"),
        **dict.fromkeys("\u2502\u2503\u2551", "|"),
        **dict.fromkeys("\u253c\u2534\u252c\u251c\u2524\u250c\u2510\u2514\u2518\u256d\u256e\u256f\u2570", "+"),
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212", "-"),
        **dict.fromkeys("\u2018\u2019", "'"),
        **dict.fromkeys("\u201c\u201d", '"'),
        "\u2026": "...",
        "\u00a0": " ",
        "\u00b1": "+/-",
        "\u00d7": "x",
        "\u2192": "->",
    }
)
"""Lines of tables and typographic signs -> ASCII. Lines keep their width, so that tables stay aligned."""


def write_anything() -> None:
    """Makes stdout and stderr take any text from now on."""
    codecs.register_error(_HANDLER, _replace)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_HANDLER)


def write_result(document: Mapping[str, object], text: str, *, as_json: bool, stdout: TextIO) -> None:
    """Writes the result of a command: the document as JSON, or the text.

    Raises:
        BrokenPipeError: the reader is gone, which is no error of ours.
        FileError: the result cannot be written, for example since the disk is full.
    """
    try:
        print(json.dumps(document, indent=1, allow_nan=False) if as_json else text, file=stdout, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        # Python writes the rest of the buffer when it ends; that would fail again, and change the exit code to 120.
        with contextlib.suppress(OSError), Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), stdout.fileno())
        raise FileError(
            f"the result could not be written to stdout: {error.strerror or error}; the work itself is done."
        ) from error


def _replace(error: UnicodeError) -> tuple[str, int]:
    """Returns the ASCII for a text that an encoding lacks; signs without a stand-in become escapes as in Python."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(_STAND_INS)
    return text.encode("ascii", "backslashreplace").decode("ascii"), error.end
