"""Errors that a user can cause: one class per exit code, and the sentence for an unknown name.

Every message names the parameter, its value, what is allowed and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

__all__ = [
    "CheckFailed",
    "DsrError",
    "FileError",
    "FormatError",
    "UsageError",
    "closest",
    "first_few",
    "first_line",
    "join_words",
    "unknown_name",
]


_MAX_MESSAGE = 450
"""Longest message of a `FormatError`, in characters. Longer ones lose their middle."""

_MAX_SHOWN_NAME = 80
"""Characters of an unknown name that are shown and compared: names come from files and command lines of any length."""

_MAX_LISTED = 30
"""Largest number of allowed names that an error lists in full."""

_SUGGESTIONS = 3
"""Largest number of close names that an error suggests."""


class DsrError(Exception):
    """Base of every error that dsr-tool raises on purpose; the command line exits with `exit_code`."""

    exit_code = 1


class UsageError(DsrError, ValueError):
    """A parameter has a value that is not allowed (exit code 2)."""

    exit_code = 2


class FileError(DsrError, OSError):
    """A file or folder is missing, already exists, or cannot be read or written (exit code 1)."""


class FormatError(DsrError, ValueError):
    """A file is damaged, of a newer version, or of another kind than expected (exit code 1).

    Messages quote text from untrusted files, so each is made one printable line of limited length: a file must not
    flood the terminal or steer it with escape sequences.
    """

    def __init__(self, message: str) -> None:
        if len(message) > _MAX_MESSAGE:
            # The end says what to do, so the middle is dropped.
            message = f"{message[: _MAX_MESSAGE * 2 // 3]} ... {message[-_MAX_MESSAGE // 3 :]}"
        # repr escapes line ends, terminal sequences and lone surrogates, which stderr may not be able to encode.
        super().__init__("".join(char if char.isprintable() else repr(char)[1:-1] for char in message))


class CheckFailed(DsrError):  # noqa: N818 - "failed" already says that it is an error
    """Two things that must agree do not: weights and masks, or a file and its model (exit code 3)."""

    exit_code = 3


def join_words(words: Sequence[str], conjunction: str = "or") -> str:
    """Joins words as in a sentence: "dsr, static or set"."""
    return f" {conjunction} ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def first_few(words: Sequence[str], most: int = 3, *, counted: bool = False) -> str:
    """Joins the first words of a list, and says if there are more: "a, b, c, ...", or counted "a, b, c and 7 more"."""
    more = len(words) - most
    rest = "" if more <= 0 else f" and {more} more" if counted else ", ..."
    return ", ".join(words[:most]) + rest


def first_line(error: BaseException) -> str:
    """Returns the first line of another library's message, or its class name if it is empty, without a full stop."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(". ")


def closest(value: str, known: Iterable[str]) -> list[str]:
    """Returns the names that `value` may have been meant to be, the closest first.

    Upper and lower case, `-`, `_` and `.` are ignored; the rest is `difflib.get_close_matches`.

    Args:
        value: the name that was typed.
        known: every allowed name.

    Returns:
        At most three of the `known` names; none if nothing is close.
    """
    # Two names can be equal once folded, such as the layers `a.b` and `a-b`.
    by_folded: dict[str, list[str]] = {}
    for name in known:
        by_folded.setdefault(_fold(name), []).append(name)
    close = difflib.get_close_matches(_fold(value[:_MAX_SHOWN_NAME]), by_folded, n=_SUGGESTIONS)
    return [name for folded in close for name in by_folded[folded]][:_SUGGESTIONS]


def _fold(name: str) -> str:
    return name.lower().translate(dict.fromkeys(map(ord, "-_.")))


def unknown_name(parameter: str, value: str, known: Iterable[str]) -> UsageError:
    """Returns the error for a `value` that is not one of the `known` names.

    The message suggests the close names; if there are none, it lists the known names, or their number if they are many.

    Args:
        parameter: what the value names, as the user wrote it (`--data`, `ARCH`).
        value: the unknown name.
        known: every allowed name.
    """
    names = sorted(known)
    if close := closest(value, names):
        hint = f"did you mean {' or '.join(close)}?"
    elif len(names) <= _MAX_LISTED:
        hint = f"known names: {', '.join(names)}."
    else:
        hint = f"there are {len(names)} known names, {names[0]} to {names[-1]}."
    return UsageError(f"{parameter} {value[:_MAX_SHOWN_NAME]!r} is unknown; {hint}")
