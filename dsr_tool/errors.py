"""What can go wrong at a user's hand, one class per exit code.

Every message is one sentence that names the parameter, its value, what is allowed and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["CheckFailed", "DsrError", "FileError", "FormatError", "UsageError", "first_line", "unknown_name"]


_LONGEST, _LONGEST_NAME = 450, 80


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


def unknown_name(parameter: str, value: str, known: Iterable[str]) -> UsageError:
    """The error for a `value` that is none of the `known` names, with the closest of them.

    Args:
        parameter: what was being named, as the user wrote it (`--data`, `ARCH`).
        value: the name that nobody knows.
        known: every allowed name.
    """
    names, value = sorted(known), value[:_LONGEST_NAME]
    close = difflib.get_close_matches(value, names, n=3, cutoff=0.5)
    if close:
        hint = f"did you mean {' or '.join(close)}?"
    elif len(names) <= 30:
        hint = f"known names: {', '.join(names)}."
    else:
        hint = f"there are {len(names)} known names, {names[0]} to {names[-1]}."
    return UsageError(f"{parameter} {value!r} is unknown; {hint}")
