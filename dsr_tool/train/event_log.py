"""`tensorboard/` in a run folder: the figures of each epoch as TensorBoard shows them, with the epoch as their step.

Records are written by tensorboard's own `RecordWriter`, at once. `torch.utils.tensorboard.SummaryWriter` writes from a
thread, where a full disk ends in a traceback, and where a process that forks to load images has a thread more.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dsr_tool.errors import UsageError, first_line, unknown_name
from dsr_tool.files import writing
from dsr_tool.sparse.model import SparseModel
from dsr_tool.train.records import EpochRecord, Observer, Start
from dsr_tool.train.resume import Stopped

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event

__all__ = ["EVENTS", "LOGS", "EventLog", "require_log"]

EVENTS = "tensorboard"
"""Name of the folder in the run folder."""
LOGS = ("tensorboard",)
"""Values of `--log`."""

_NAME = "events.out.tfevents"
"""Beginning of the names of files in the folder; TensorBoard reads those that have `tfevents` in them, by name."""
_VERSION = "brain.Event:2"
"""First record of a file. From version 2 on, readers drop the steps that a later start takes again."""


def require_log(name: str | None) -> None:
    """Raises `UsageError` unless a value of `--log` is known, and what writes it is installed; None needs nothing."""
    if name is None:
        return
    if name not in LOGS:
        raise unknown_name("--log", name, LOGS)
    try:
        import tensorboard.summary.writer.record_writer  # noqa: F401
        from tensorboard.compat.proto import event_pb2  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"--log 'tensorboard' needs the package tensorboard, which cannot be imported ({first_line(error)}); run: "
            f"pip install 'dsr-tool[tensorboard]'"
        ) from error


class EventLog(Observer):
    """Writes a file of events for each call that trains.

    A run that resumes begins another file, which tells readers to drop the epochs that are trained again; without an
    older file, it also gets the epochs of the calls before. It must be notified before the run folder, so that an epoch
    with a checkpoint always has its events.
    """

    def __init__(self, run: Path, stopped: Stopped | None) -> None:
        """Prepares the log; nothing is written yet.

        Args:
            run: the run folder, which exists when the training starts.
            stopped: the run to resume; None for a training from the start.

        Raises:
            UsageError: tensorboard is not installed.
        """
        require_log(EVENTS)
        self._folder, self._stopped = run / EVENTS, stopped
        self._start: Start | None = None
        self._opening: list[Event] = []

    def on_evaluated_start(self, start: Start) -> None:
        """Keeps the figures of epoch 0 until there is a folder."""
        self._start = start

    def on_start(self, model: SparseModel, total_steps: int) -> None:  # noqa: ARG002 - the observer's signature
        """Writes the epochs of earlier calls if they are in no file."""
        self._prunable = model.prunable_weights
        older = sorted(self._folder.glob(f"{_NAME}.*"))
        # Numbered, not dated, so that a clock that was set back does not change their order.
        self._file = self._folder / f"{_NAME}.{len(older):06d}"
        # Written with the first epoch: there is no folder before, and a run that is complete needs no further file.
        self._opening = [_event(0, file_version=_VERSION)]
        if self._stopped is None:
            self._opening += self._first()
        elif older:
            self._opening.append(_purge(len(self._stopped.epochs) + 1))
        else:
            self._write([*self._first(), *self._events(self._stopped.epochs)])

    def on_epoch(self, model: SparseModel, record: EpochRecord) -> None:  # noqa: ARG002
        """Writes an epoch, so that TensorBoard shows it at once."""
        self._write(self._events([record]))

    def _first(self) -> Iterator[Event]:
        """Yields what is known of epoch 0."""
        if self._start is not None:
            figures = {"accuracy/test": self._start.test_accuracy, "loss/test": self._start.test_loss}
        else:
            accuracy = self._stopped.start_accuracy if self._stopped else None
            figures = {} if accuracy is None else {"accuracy/test": accuracy}
        if figures:
            yield _scalars(0, figures)

    def _events(self, records: Sequence[EpochRecord]) -> Iterator[Event]:
        for record in records:
            yield _scalars(record.epoch, _figures(record, self._prunable))

    def _write(self, events: Iterable[Event]) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        with writing(self._folder, "what was saved before is complete"):
            self._folder.mkdir(exist_ok=True)
            with self._file.open("ab") as file:
                writer = RecordWriter(file)
                for event in (*self._opening, *events):
                    writer.write(event.SerializeToString())
        self._opening = []


def _figures(record: EpochRecord, prunable: int) -> dict[str, float]:
    """Returns the scalars of an epoch by the tag under which they are shown."""
    totals = record.totals(prunable)
    return {
        "loss/train": record.train_loss,
        "loss/test": record.test_loss,
        "accuracy/train": record.train_accuracy,
        "accuracy/test": record.test_accuracy,
        "learning_rate": record.lr,
        "epoch_time_s": record.time_s,
        "sparsity": totals["sparsity"],
        "moved/dropped": totals["dropped"],
        "moved/grown": totals["grown"],
        **({} if record.threshold is None else {"threshold": record.threshold}),
        **{f"density/{name.removesuffix('.weight')}": share for name, share in record.density.items()},
    }


def _scalars(epoch: int, figures: Mapping[str, float]) -> Event:
    from tensorboard.compat.proto.summary_pb2 import Summary

    values = [Summary.Value(tag=tag, simple_value=value) for tag, value in figures.items()]
    return _event(epoch, summary=Summary(value=values))


def _purge(epoch: int) -> Event:
    """Returns the event after which readers drop what older files have of this epoch and later ones."""
    from tensorboard.compat.proto.event_pb2 import SessionLog

    return _event(epoch, session_log=SessionLog(status=SessionLog.START))


def _event(epoch: int, **content: object) -> Event:
    from tensorboard.compat.proto.event_pb2 import Event

    return Event(wall_time=time.time(), step=epoch, **content)
