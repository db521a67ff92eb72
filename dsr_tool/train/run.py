"""RunFolder: the folder that a training writes, which can be loaded at every moment."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from dsr_tool.errors import FileError
from dsr_tool.files import new_folder, refuse_existing, writing
from dsr_tool.methods import Reallocation
from dsr_tool.sparse.folder import CONFIG, save_folder, write_model
from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparsity.config import installed_versions
from dsr_tool.train.checkpoint import PART, finish_replacing, replace_model, sync
from dsr_tool.train.csv_log import CSV, append_epoch, write_epochs
from dsr_tool.train.exploration import Exploration
from dsr_tool.train.lock import Lock
from dsr_tool.train.records import EpochRecord, Observer, Start
from dsr_tool.train.resume import LOG, SETTINGS, Stopped, find_stopped

__all__ = ["LOG", "SETTINGS", "RunFolder"]

_BEST = "best"
_KEPT = "what was saved before is complete"


class RunFolder(Observer):
    """A model folder of the last complete epoch, with `log.jsonl`, `log.csv`, `settings.json` and `best/` in it.

    The folder is created before the first step, with the model as it is then, and removed if no epoch completes. Model
    and checkpoint are replaced together, so a run that was killed at any moment resumes from its last complete epoch.

    Attributes:
        path: path of the folder.
        facts: plain values for `settings.json` and the log, set before the training starts: settings, and where model
            and data came from.
        files: texts of further files by name, set before the training starts.
        stopped: the run to resume; None for a training from the start.
    """

    def __init__(self, path: str | Path, *, force: bool = False, resume: bool = False) -> None:
        """Checks that the folder can be created; nothing is written yet.

        Args:
            path: the new folder.
            force: replace an existing run folder.
            resume: resume the run in it; start anew if the folder does not exist or has no complete epoch.

        Raises:
            FileError: the folder exists and is not empty without `force`, holds something else, cannot be created, or
                another process is training in it.
            FormatError: the run to resume is damaged.
        """
        self.path = Path(path)
        self.facts: dict[str, Any] = {}
        self.files: dict[str, str] = {}
        # Locked before anything is read, since a training in another process replaces the files.
        self._lock: Lock | None = None
        if (force or resume) and (self.path / LOG).is_file():
            self._lock = Lock(self.path / LOG)
        self.stopped: Stopped | None = find_stopped(self.path) if resume else None
        self._resume = resume
        refuse_existing(self.path, force=force or resume, marker=CONFIG)
        self._start: dict[str, float] = {}
        self._explored: Exploration | None = None
        self._best: float | None = None
        self._done = 0
        self._paused = False
        self._started = False
        self._replaced: Path | None = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._end(kind)
        finally:
            if self._lock is not None:
                self._lock.release()

    def on_evaluated_start(self, start: Start) -> None:
        """Keeps the figures for the first line of the log, where older readers skip them."""
        self._start = {"start_accuracy": start.test_accuracy, "start_loss": start.test_loss}

    def on_start(self, model: SparseModel, total_steps: int) -> None:
        """Creates the folder, or restores the existing one to its last complete epoch."""
        model.check()
        self._names, self._prunable = model.trained, model.prunable_weights
        self._explored = Exploration(model, self.stopped.explored if self.stopped else None)
        if self.stopped is not None:
            self._restore(self.stopped)
            return
        start = {
            **self.facts,
            "versions": installed_versions(),
            "total_steps": total_steps,
            "parameters": model.parameters,
            "prunable_weights": model.prunable_weights,
            "active_weights": model.active_weights,
            **self._start,
        }
        if self.path.is_dir() and any(self.path.iterdir()):
            self._move_aside()
        with new_folder(self.path, marker=CONFIG) as part:
            write_model(model, part)
            (part / SETTINGS).write_text(json.dumps(self.facts, indent=1) + "\n", encoding="utf-8")
            (part / LOG).write_text(_line("start", start), encoding="utf-8")
            write_epochs(part, (), self._prunable)
            for name, text in self.files.items():
                (part / name).write_text(text, encoding="utf-8")
        self._started = True
        # The log is a new file now, so a lock on the old one, if any, keeps nobody out.
        self._lock = Lock(self.path / LOG)

    def on_step(self, step: int) -> None:  # noqa: ARG002 - the observer's signature
        """Records which weights are active; a method may change that at every step."""
        if self._explored is not None:
            self._explored.look()

    def on_pause(self, epoch: int) -> None:  # noqa: ARG002
        """Marks the run as paused, for the last line of the log."""
        self._paused = True

    def on_reallocation(self, step: int, moved: Reallocation) -> None:
        """Logs the reallocation."""
        self._log(
            "reallocation",
            step=step,
            dropped=dict(zip(self._names, moved.dropped.counts, strict=True)),
            grown=dict(zip(self._names, moved.grown.counts, strict=True)),
            **moved.facts,
        )

    def on_epoch(self, model: SparseModel, record: EpochRecord) -> None:
        """Logs the epoch and saves the best model. A log line without a checkpoint is cut off when the run resumes."""
        explored = self._explored.counts() if self._explored else {}
        self._log("epoch", **asdict(record), explored=explored)
        with writing(self.path, _KEPT):
            append_epoch(self.path, record, self._prunable)
        # Only a higher accuracy replaces it, so best/ is the first of equal epochs, as TrainResult.best is.
        if self._best is None or record.test_accuracy > self._best:
            with writing(self.path, _KEPT):
                save_folder(model, self.path / _BEST, force=True)
            self._best = record.test_accuracy

    def on_state(self, model: SparseModel, state: Mapping[str, Any]) -> None:
        """Saves model and checkpoint together."""
        model.check()
        with writing(self.path, _KEPT):
            # The checkpoint states the length of the log, which must be on the disk before it.
            sync([self.path / LOG])
            more = {
                "log_bytes": (self.path / LOG).stat().st_size,
                "explored": self._explored.bits() if self._explored else {},
            }
            replace_model(model, {"training": state, **more}, self.path)
        self._done = int(state["epoch"])
        self._delete_replaced()

    def _restore(self, stopped: Stopped) -> None:
        """Removes what a killed process left half done, and cuts the logs to the last complete epoch."""
        stopped.require({name: value for name, value in self.facts.items() if name not in ("settings", "log")})
        with writing(self.path, _KEPT):
            finish_replacing(self.path)
            if not (self.path / _BEST).exists():  # the process was killed while it replaced this folder
                for old in self.path.glob(f".{_BEST}.*.old/{_BEST}"):
                    old.rename(self.path / _BEST)
            for pattern in (f"{PART}*", f".{_BEST}.*"):
                for part in self.path.glob(pattern):
                    shutil.rmtree(part, ignore_errors=True)
            for file in self.path.glob(f".{CSV}.*"):
                file.unlink()
            os.truncate(self.path / LOG, stopped.log_bytes)
            # Made of the records: it has their rows however the process ended, and runs of older versions get it.
            write_epochs(self.path, stopped.epochs, self._prunable)
        self._best = max(record.test_accuracy for record in stopped.epochs)
        self._done = len(stopped.epochs)
        self._started = True

    def _move_aside(self) -> None:
        """Keeps the run to replace until an epoch completes: a failed run must not cost an older one."""
        with writing(self.path):
            aside = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.replaced.", dir=self.path.absolute().parent))
            self._replaced = self.path.rename(aside / self.path.name)
        if self._resume:  # the older run has no complete epoch either, so nothing would be lost
            self._delete_replaced()

    def _delete_replaced(self) -> None:
        if self._replaced is not None:
            shutil.rmtree(self._replaced.parent, ignore_errors=True)
            self._replaced = None

    def _end(self, kind: type[BaseException] | None) -> None:
        """Logs how the run ended, or removes it if no epoch completed."""
        if kind is not None and not self._done:
            if self._started:
                shutil.rmtree(self.path, ignore_errors=True)
            if self._replaced is not None:
                self._replaced.rename(self.path)
                self._replaced.parent.rmdir()
            return
        if not self._started:
            return
        ended = "paused" if self._paused else "complete"
        status = ended if kind is None else "interrupted" if kind is KeyboardInterrupt else "failed"
        try:
            self._log("end", status=status, epochs=self._done, best_accuracy=self._best)
        except FileError:
            # If something else went wrong before, that is the error to show.
            if kind is None:
                raise

    def _log(self, kind: str, **values: Any) -> None:
        with writing(self.path, _KEPT), (self.path / LOG).open("a", encoding="utf-8") as file:
            file.write(_line(kind, values))


def _line(kind: str, values: Mapping[str, Any]) -> str:
    entry = {"kind": kind, **{name: _without_nan(value) for name, value in values.items()}}
    return json.dumps(entry, allow_nan=False) + "\n"


def _without_nan(value: object) -> object:
    """Replaces NaN and inf by None, since JSON has neither; the facts of a method may contain them."""
    if isinstance(value, Mapping):
        return {key: _without_nan(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
