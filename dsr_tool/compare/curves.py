"""Curves of a row: means over its seeds, epoch by epoch."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dsr_tool.compare.cells import Comparison
from dsr_tool.compare.results import Row
from dsr_tool.report.runlog import Epoch, RunLog, read_log

__all__ = ["Curves", "curves"]


@dataclass(frozen=True)
class Curves:
    """Means over the complete runs of a row.

    Attributes:
        row: the row.
        epochs: numbers of the epochs that all runs have.
        accuracy: mean test accuracy after each epoch.
        explored: mean fraction of the prunable weights that have been active at any time; empty if no log has it.
        first: epochs of the first run, for charts that show a single run.
    """

    row: Row
    epochs: tuple[int, ...]
    accuracy: tuple[float, ...]
    explored: tuple[float, ...]
    first: tuple[Epoch, ...]


def curves(comparison: Comparison, row: Row) -> Curves | None:
    """Returns the curves of a row; None if no run of it is complete.

    Raises:
        FormatError: a log is damaged.
    """
    # A record without its log is possible: run folders may be deleted to save space.
    done = [cell for cell, record in zip(row.cells, row.records, strict=True) if record in row.complete]
    logs = [read_log(file) for cell in done if (file := comparison.run_folder(cell.name) / "log.jsonl").is_file()]
    logs = [log for log in logs if log.epochs]
    if not logs:
        return None
    # A mean needs all runs, so it ends with the shortest one.
    count = min(len(log.epochs) for log in logs)
    explored = _means(logs, count, _explored) if all(log.epochs[0].explored for log in logs) else ()
    accuracy = _means(logs, count, _accuracy)
    return Curves(row, tuple(e.number for e in logs[0].epochs[:count]), accuracy, explored, logs[0].epochs)


def _means(logs: Sequence[RunLog], count: int, figure: Callable[[RunLog, Epoch], float]) -> tuple[float, ...]:
    """Returns the mean of a figure over the logs, for each of the first `count` epochs."""
    return tuple(statistics.fmean(figure(log, log.epochs[i]) for log in logs) for i in range(count))


def _accuracy(log: RunLog, epoch: Epoch) -> float:  # noqa: ARG001 - the signature of `_explored`
    """Returns the test accuracy after an epoch."""
    return epoch.test_accuracy


def _explored(log: RunLog, epoch: Epoch) -> float:
    """Returns the share of the prunable weights that were active in any epoch so far."""
    # The log counts weights; a damaged one may count more than there are.
    return min(sum(epoch.explored.values()) / max(int(log.start.get("prunable_weights", 0)), 1), 1.0)
