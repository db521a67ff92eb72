"""`log.csv`: the epochs of a run as a table, a row each, for spreadsheets and plots. `log.jsonl` has the layers too."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from dsr_tool.files import new_file
from dsr_tool.train.records import EpochRecord

__all__ = ["COLUMNS", "CSV", "append_epoch", "write_epochs"]

CSV = "log.csv"

COLUMNS = (
    *("epoch", "step", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "lr", "time_s"),
    *("active_weights", "sparsity", "dropped", "grown", "threshold"),
)
"""Headers of the columns: figures of `EpochRecord`, or what `EpochRecord.totals` has under such a name."""


def write_epochs(folder: Path, records: Iterable[EpochRecord], prunable: int) -> None:
    """Writes the table of some epochs, or replaces it as a whole.

    Args:
        folder: the run folder.
        records: the complete epochs of the run.
        prunable: number of prunable weights of the model.

    Raises:
        FileError: writing fails; an older table stays as it is.
    """
    with new_file(folder / CSV, force=True) as part:
        part.write_bytes(_lines([list(COLUMNS), *(_row(record, prunable) for record in records)]))


def append_epoch(folder: Path, record: EpochRecord, prunable: int) -> None:
    """Appends a row, with arguments as in `write_epochs`."""
    with (folder / CSV).open("ab") as file:
        file.write(_lines([_row(record, prunable)]))


def _row(record: EpochRecord, prunable: int) -> list[float | None]:
    totals = record.totals(prunable)
    return [totals[name] if name in totals else getattr(record, name) for name in COLUMNS]


def _lines(rows: Iterable[Sequence[object]]) -> bytes:
    """Returns rows as RFC 4180 has them, with CRLF; a value that does not exist is an empty cell."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()
