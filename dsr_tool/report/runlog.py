"""Reads the log of a run: its settings, epochs and reallocations."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from dsr_tool.errors import FormatError

__all__ = ["Epoch", "Reallocated", "RunLog", "RunSummary", "read_log"]

_MAX_NUMBER = 1e30
"""Largest magnitude of a logged number; anything above is treated as not finite, since a chart could not show it."""


@dataclass(frozen=True)
class Epoch:
    """One epoch of a log; a loss that was not finite is NaN.

    Attributes:
        number: number of the epoch, from 1.
        step: number of optimizer steps since the start.
        train_loss: mean loss over the epoch.
        test_loss: mean loss over all test images.
        train_accuracy: fraction of training images classified correctly.
        test_accuracy: fraction of test images classified correctly.
        lr: learning rate at the end of the epoch.
        time_s: duration in seconds.
        density: fraction of active weights, by layer.
        dropped: number of weights dropped, by layer.
        grown: number of weights grown, by layer.
        threshold: pruning threshold at the last reallocation; None for methods without one.
        explored: number of weights that were ever active since the start, by layer.
    """

    number: int
    step: int
    train_loss: float
    test_loss: float
    train_accuracy: float
    test_accuracy: float
    lr: float
    time_s: float
    density: Mapping[str, float]
    dropped: Mapping[str, int]
    grown: Mapping[str, int]
    threshold: float | None
    explored: Mapping[str, int]

    @classmethod
    def from_line(cls, line: Mapping[str, Any]) -> Epoch:
        """Parses a log line; raises `TypeError`, `ValueError` or `LookupError` for any other line."""
        return cls(
            _whole(line["epoch"]),
            _whole(line["step"]),
            _float(line["train_loss"]),
            _float(line["test_loss"]),
            _fraction(line["train_accuracy"]),
            _fraction(line["test_accuracy"]),
            _float(line["lr"]),
            _float(line["time_s"]),
            {str(name): _fraction(share) for name, share in line["density"].items()},
            _counts(line["dropped"]),
            _counts(line["grown"]),
            _optional(line["threshold"]),
            _counts(line.get("explored", {})),
        )


@dataclass(frozen=True)
class Reallocated:
    """One reallocation of a log.

    Attributes:
        step: number of optimizer steps before it.
        dropped: number of weights dropped in all layers.
        grown: number of weights grown in all layers.
        threshold: pruning threshold; None for methods without one.
    """

    step: int
    dropped: int
    grown: int
    threshold: float | None

    @classmethod
    def from_line(cls, line: Mapping[str, Any]) -> Reallocated:
        """Parses a log line; raises like `Epoch.from_line`."""
        dropped, grown = (sum(_counts(line[key]).values()) for key in ("dropped", "grown"))
        return cls(_whole(line["step"]), dropped, grown, _optional(line.get("threshold")))


class RunSummary(TypedDict):
    """A run in a few plain values, the part `training` of a report's JSON.

    Attributes:
        status: as in `RunLog`.
        method: name of the training method.
        data: name of the data set, as the user gave it.
        epochs: number of completed epochs.
        reallocations: number of reallocations.
        weights_moved: number of weights dropped in all of them.
        start_test_accuracy: fraction of test images classified correctly before the first step; None in older logs.
        last_test_accuracy: fraction of test images classified correctly after the last epoch; None before the first.
        best_test_accuracy: highest such fraction; None before the first epoch.
        best_epoch: number of the epoch that reached it; None before the first.
    """

    status: str
    method: str
    data: str
    epochs: int
    reallocations: int
    weights_moved: int
    start_test_accuracy: float | None
    last_test_accuracy: float | None
    best_test_accuracy: float | None
    best_epoch: int | None


@dataclass(frozen=True)
class RunLog:
    """A whole log.

    Attributes:
        start: contents of the first line: data, settings, versions.
        status: `complete`, `paused`, `interrupted`, `failed`, or `cut off` if the last line is missing.
        epochs: the completed epochs, in order.
        reallocations: the reallocations, in order.
    """

    start: Mapping[str, Any]
    status: str
    epochs: tuple[Epoch, ...]
    reallocations: tuple[Reallocated, ...]

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the training by name."""
        return dict(self.start["settings"])

    def summary(self) -> RunSummary:
        """Returns method, epochs and accuracies as plain values."""
        # A run may end before its first epoch. Of equal accuracies `max` takes the first, as the run itself does.
        best = max(self.epochs, key=lambda epoch: epoch.test_accuracy, default=None)
        return {
            "status": self.status,
            "method": str(self.settings["method"]),
            "data": str(self.start["data"]),
            "epochs": len(self.epochs),
            "reallocations": len(self.reallocations),
            "weights_moved": sum(reallocation.dropped for reallocation in self.reallocations),
            "start_test_accuracy": None if (start := self.start.get("start_accuracy")) is None else _fraction(start),
            "last_test_accuracy": self.epochs[-1].test_accuracy if self.epochs else None,
            "best_test_accuracy": best.test_accuracy if best else None,
            "best_epoch": best.number if best else None,
        }


def read_log(path: Path) -> RunLog:
    """Reads a `log.jsonl`.

    Raises:
        FormatError: a line is not a record of a log.
    """
    # As bytes: a file cut off within a character could not be decoded as a whole.
    text = path.read_bytes()
    # A full disk or a power cut can cut off the last line; the lines before it are still valid.
    whole = text[: text.rfind(b"\n") + 1]
    try:
        return _log([json.loads(line) for line in whole.splitlines() if line.strip()])
    # A log may come from anywhere: strange values (10**400, nested lists) must end in one sentence, not in a traceback.
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise FormatError(
            f"log {str(path)!r} is not valid ({error!r}); the run is damaged, so restore the file or delete it."
        ) from error


def _log(lines: list[dict[str, Any]]) -> RunLog:
    """Returns the log of parsed lines; raises like `Epoch.from_line` for lines that are no log."""
    kinds: dict[str, list[dict[str, Any]]] = {"start": [], "epoch": [], "reallocation": [], "end": []}
    for line in lines:
        kinds[line["kind"]].append(line)
    # Resuming cuts off the `end` of the call before. A log without one is of a run that was killed, or still runs.
    log = RunLog(
        dict(kinds["start"][0]),
        str(kinds["end"][-1]["status"]) if kinds["end"] else "cut off",
        tuple(Epoch.from_line(line) for line in kinds["epoch"]),
        tuple(Reallocated.from_line(line) for line in kinds["reallocation"]),
    )
    log.summary()  # raises here if the start line lacks the method or the data
    return log


def _float(value: Any) -> float:
    """Returns a logged number; NaN for null, which stands for a number that was not finite, and for huge ones."""
    # Infinity and NaN are not JSON, so a run logs null for them.
    number = math.nan if value is None else float(value)
    return number if abs(number) < _MAX_NUMBER else math.nan


def _whole(value: Any) -> int:
    """Returns a logged count; raises `ValueError` for other numbers."""
    number = int(value)
    if not 0 <= number < _MAX_NUMBER:
        raise ValueError(f"{value!r} is not a count")
    return number


def _fraction(value: Any) -> float:
    """Returns a logged fraction; raises `ValueError` for other numbers, NaN included."""
    number = float(value)
    if not 0 <= number <= 1:
        raise ValueError(f"{value!r} is not a fraction")
    return number


def _optional(value: Any) -> float | None:
    """Returns a logged threshold; None for methods without one."""
    return None if value is None else _float(value)


def _counts(counts: Any) -> dict[str, int]:
    """Returns logged counts by layer."""
    return {str(name): _whole(count) for name, count in counts.items()}
