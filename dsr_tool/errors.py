"""What can go wrong at a user's hand, one class per exit code.

Every message is one sentence that names the parameter, its value, what is allowed and what to do next.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

__all__ = ["CheckFailed", "DsrError", "FileError", "FormatError", "UsageError", "closest", "first_line", "unknown_name"]


_LONGEST, _LONGEST_NAME = 450, 80
_FIRST_WORD = re.compile(r"^[^\W\d_]*")


class DsrError(Exception):
    """Base of every error that dsr-tool raises on purpose; the command line exits with `exit_code`."""

    exit_code = 1


class UsageError(DsrError, ValueError):
    """A parameter has a value that is not allowed (exit code 2)."""

    exit_code = 2


class FileError(DsrError, OSError):
    """A file or folder is missing, exists already, or cannot be read or written (exit code 1)."""


class FormatError(DsrError, ValueError):
    """A file is damaged, of a newer version, or not of the kind that was asked for (exit code 1).

    Such messages cite what stands in files of strangers: they are one printable line, and long ones lose their middle.
    """

    def __init__(self, message: str) -> None:
        if len(message) > _LONGEST:
            message = f"{message[: _LONGEST * 2 // 3]} ... {message[-_LONGEST // 3 :]}"
        super().__init__("".join(char if char.isprintable() else repr(char)[1:-1] for char in message))


class CheckFailed(DsrError):  # noqa: N818 - it says what happened
    """Something that should agree does not: weights and masks, or a file and its model (exit code 3)."""

    exit_code = 3


def first_line(error: BaseException) -> str:
    """The first line of what another library says, or its class where it says nothing; without a full stop."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(". ")


def closest(value: str, known: Iterable[str]) -> list[str]:
    """Names that somebody may have meant, at most three, the likeliest first; none where nothing is close.

    Case, dashes, underscores and dots do not count, nor does a table before a dot that all have in common. Offered are,
    of these kinds, the names of the first that there are any of: the same name; those that begin with what was typed
    (of three letters or more); those that are alike, or whose first word is: the same letters in another order, or four
    in five in common, in order; those with the same first letter, and two in three in common; those that have what was
    typed (four letters or more) in them.

    Args:
        value: what was typed.
        known: every allowed name.
    """
    names, start = list(known), value.rfind(".") + 1
    if not all(name.startswith(value[:start]) for name in names):
        start = 0
    typed, whole = _folded(value[start:]), {name: _folded(name[start:]) for name in names}
    first = {name: _folded(_FIRST_WORD.findall(name[start:])[0]) for name in names}
    likeness = {name: _likeness(typed, whole[name]) for name in names}
    found = (
        [name for name in names if whole[name] == typed][:1]
        or [name for name in names if len(typed) >= 3 and whole[name].startswith(typed)]
        or [name for name in names if max(likeness[name], _likeness(typed, first[name])) >= 0.8]
        or [name for name in names if whole[name][:1] == typed[:1] and likeness[name] >= 2 / 3]
        or [name for name in names if len(typed) >= 4 and typed in whole[name]]
    )
    return sorted(found, key=lambda name: (-likeness[name], len(name), name))[:3]


def _folded(name: str) -> str:
    return name.lower().translate(dict.fromkeys(map(ord, "-_. ")))


def _likeness(typed: str, word: str) -> float:
    """Share of the letters of both that are in common, in order; 1 as well where only their order differs."""
    if sorted(typed) == sorted(word):
        return 1.0
    return difflib.SequenceMatcher(None, typed, word, autojunk=False).ratio()


def unknown_name(parameter: str, value: str, known: Iterable[str]) -> UsageError:
    """The error for a `value` that is none of the `known` names, with those that are close to it.

    Args:
        parameter: what was being named, as the user wrote it (`--data`, `ARCH`).
        value: the name that nobody knows.
        known: every allowed name.
    """
    names, value = sorted(known), value[:_LONGEST_NAME]
    if close := closest(value, names):
        hint = f"did you mean {' or '.join(close)}?"
    elif len(names) <= 30:
        hint = f"known names: {', '.join(names)}."
    else:
        hint = f"there are {len(names)} known names, {names[0]} to {names[-1]}."
    return UsageError(f"{parameter} {value!r} is unknown; {hint}")
