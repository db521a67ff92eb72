"""The log of a run, read back: what it was told, its epochs and its reallocations."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsr_tool.errors import FormatError

__all__ = ["Epoch", "Reallocated", "RunLog", "read_log"]

_LARGEST = 1e30


@dataclass(frozen=True)
class Epoch:
    """One epoch as logged; a loss that was not finite is NaN.

    Attributes:
        number: the first is 1.
        step: optimizer steps since the start.
        train_loss, test_loss: means over the epoch and over all test images.
        train_accuracy, test_accuracy: fractions right.
        lr: learning rate at its end.
        time_s: its seconds.
        density: fraction of active weights by layer.
        dropped, grown: weights moved, by layer.
        threshold: at its last reallocation, where the method has one.
        explored: weights ever active since the start, by layer.
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
        """An epoch of its log line; raises `TypeError`, `ValueError` or `LookupError` for anything else."""
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
    """One reallocation: its step, weights dropped and grown in all, and the threshold where there is one."""

    step: int
    dropped: int
    grown: int
    threshold: float | None

    @classmethod
    def from_line(cls, line: Mapping[str, Any]) -> Reallocated:
        """A reallocation of its log line; raises as `Epoch.from_line` does."""
        dropped, grown = (sum(_counts(line[what]).values()) for what in ("dropped", "grown"))
        return cls(_whole(line["step"]), dropped, grown, _optional(line.get("threshold")))


@dataclass(frozen=True)
class RunLog:
    """A whole log.

    Attributes:
        start: facts of the first line: data, settings, versions.
        status: `complete`, `interrupted`, `failed`, or `cut off` when there is no last line.
        epochs: in order.
        reallocations: in order.
    """

    start: Mapping[str, Any]
    status: str
    epochs: tuple[Epoch, ...]
    reallocations: tuple[Reallocated, ...]

    @property
    def settings(self) -> dict[str, Any]:
        """What the training was told."""
        return dict(self.start["settings"])

    def summary(self) -> dict[str, Any]:
        """Method, epochs and accuracy, as plain values."""
        best = max(self.epochs, key=lambda epoch: epoch.test_accuracy, default=None)
        return {
            "status": self.status,
            "method": str(self.settings["method"]),
            "data": str(self.start["data"]),
            "epochs": len(self.epochs),
            "reallocations": len(self.reallocations),
            "weights_moved": sum(moved.dropped for moved in self.reallocations),
            "last_test_accuracy": self.epochs[-1].test_accuracy if self.epochs else None,
            "best_test_accuracy": best.test_accuracy if best else None,
            "best_epoch": best.number if best else None,
        }


def read_log(path: Path) -> RunLog:
    """Read a `log.jsonl`.

    Raises:
        FormatError: a line that is not understood.
    """
    text = path.read_bytes()
    # A last line that was cut off, by a full disk or a power cut, tells nothing.
    whole = text[: text.rfind(b"\n") + 1]
    try:
        return _log([json.loads(line) for line in whole.splitlines() if line.strip()])
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise FormatError(f"log {str(path)!r} is not understood ({error!r}); the run is damaged.") from error


def _log(lines: list[dict[str, Any]]) -> RunLog:
    kinds: dict[str, list[dict[str, Any]]] = {"start": [], "epoch": [], "reallocation": [], "end": []}
    for line in lines:
        kinds[line["kind"]].append(line)
    log = RunLog(
        dict(kinds["start"][0]),
        str(kinds["end"][-1]["status"]) if kinds["end"] else "cut off",
        tuple(Epoch.from_line(line) for line in kinds["epoch"]),
        tuple(Reallocated.from_line(line) for line in kinds["reallocation"]),
    )
    log.summary()  # a start without method or data is found here, not later
    return log


def _float(value: Any) -> float:
    """A logged number; what was not finite is logged as null, and what is past all sense counts as that."""
    number = math.nan if value is None else float(value)
    return number if abs(number) < _LARGEST else math.nan


def _whole(value: Any) -> int:
    number = int(value)
    if not 0 <= number < _LARGEST:
        raise ValueError(f"{value!r} is not a count")
    return number


def _fraction(value: Any) -> float:
    number = float(value)
    if not 0 <= number <= 1:
        raise ValueError(f"{value!r} is not a fraction")
    return number


def _optional(value: Any) -> float | None:
    return None if value is None else _float(value)


def _counts(counts: Any) -> dict[str, int]:
    return {str(name): _whole(count) for name, count in counts.items()}
