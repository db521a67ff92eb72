"""The settings of an accuracy report, as the command line gives them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dsr_tool.errors import UsageError

__all__ = ["AccuracyRequest", "accuracy_request"]


@dataclass(frozen=True)
class AccuracyRequest:
    """The settings of an accuracy report.

    Attributes:
        data: folder of pictures, with `labels.csv` or class folders if classes are known.
        against: model to compare with: a folder, an exported file, or weights of the same architecture.
        maker: `module:callable` that builds a network of the user's own.
    """

    data: Path
    against: Path | None = None
    maker: str | None = None


def accuracy_request(data: Path | None, *, against: Path | None, maker: str | None = None) -> AccuracyRequest | None:
    """Returns the request of a command line; None without `--accuracy`.

    Raises:
        UsageError: `--against` is given without it.
    """
    if data is not None:
        return AccuracyRequest(data, against, maker)
    # Ignored silently, it would seem to have had an effect.
    if against is not None:
        raise UsageError("--against needs --accuracy, a folder of pictures to compare both on; add it.")
    return None
