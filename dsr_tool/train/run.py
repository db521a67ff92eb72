"""RunFolder: what a training leaves on disk, loadable at every moment."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from dsr_tool.errors import FileError
from dsr_tool.files import new_folder, refuse_existing, writing
from dsr_tool.methods import Reallocation
from dsr_tool.sparse.folder import CONFIG, NEXT, save_folder, write_model
from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparsity.config import installed_versions
from dsr_tool.train.checkpoint import CHECKPOINT, write_state
from dsr_tool.train.exploration import Exploration
from dsr_tool.train.lock import Lock
from dsr_tool.train.records import EpochRecord, Observer
from dsr_tool.train.resume import LOG, SETTINGS, Stopped, find_stopped

__all__ = ["LOG", "SETTINGS", "RunFolder"]

_BEST, _PART = "best", ".part."
_KEPT = "what was saved before is whole"


class RunFolder(Observer):
    """A model folder of the last complete epoch, with `log.jsonl`, `settings.json` and `best/` beside it.

    It is made whole before the first step, with the model as it is then, and removed again when no epoch was completed.
    The state of the training is replaced together with the model, so that a run that was stopped at any moment can
    be resumed from its last complete epoch.

    Attributes:
        path: the folder.
        facts: plain values for `settings.json` and the log, set before the training starts: its settings, where
            model and data came from.
        files: further texts that are written beside them, by name.
        stopped: what is resumed; None for a training from the start.
    """

    def __init__(self, path: str | Path, *, force: bool = False, resume: bool = False) -> None:
        """Check that the folder can be made; nothing is written yet.

        Args:
            path: the new folder.
            force: replace an existing folder.
            resume: go on where the run in it stopped; from the start where it has no complete epoch, or is not there.

        Raises:
            FileError: it exists and is not empty, without `force` or with something else in it, cannot be made, or is
                being trained by another process.
            FormatError: the run to resume is damaged.
        """
        self.path = Path(path)
        self.facts: dict[str, Any] = {}
        self.files: dict[str, str] = {}
        # Before anything is read, since a training that goes on replaces it.
        self._lock: Lock | None = None
        if (force or resume) and (self.path / LOG).is_file():
            self._lock = Lock(self.path / LOG)
        self.stopped: Stopped | None = find_stopped(self.path) if resume else None
        self._resume = resume
        refuse_existing(self.path, force=force or resume, marker=CONFIG)
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

    def _end(self, kind: type[BaseException] | None) -> None:
        if kind is not None and not self._done:
            self._undo()
            return
        if not self._started:
            return
        ended = "paused" if self._paused else "complete"
        status = ended if kind is None else "interrupted" if kind is KeyboardInterrupt else "failed"
        try:
            self._log("end", status=status, epochs=self._done, best_accuracy=self._best)
        except FileError:
            # What went wrong before is the error to show.
            if kind is None:
                raise

    def on_start(self, model: SparseModel, total_steps: int) -> None:
        """Make the folder, or take the one that is there back to its last complete epoch."""
        model.check()
        self._names = model.trained
        self._explored = Exploration(model, self.stopped.explored if self.stopped else None)
        if self.stopped is not None:
            self._go_on(self.stopped)
            return
        start = {
            **self.facts,
            "versions": installed_versions(),
            "total_steps": total_steps,
            "parameters": model.parameters,
            "prunable_weights": model.prunable_weights,
            "active_weights": model.active_weights,
        }
        if self.path.is_dir() and any(self.path.iterdir()):
            # Kept until an epoch is complete: a run that learns nothing must not cost an older one.
            with writing(self.path):
                aside = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.replaced.", dir=self.path.absolute().parent))
                self._replaced = self.path.rename(aside / self.path.name)
            if self._resume:  # the run that was there has not learnt anything either
                self._forget_replaced()
        with new_folder(self.path, marker=CONFIG) as part:
            write_model(model, part)
            (part / SETTINGS).write_text(json.dumps(self.facts, indent=1) + "\n", encoding="utf-8")
            (part / LOG).write_text(_line("start", start), encoding="utf-8")
            for name, text in self.files.items():
                (part / name).write_text(text, encoding="utf-8")
        self._started = True
        self._lock = Lock(self.path / LOG)

    def _go_on(self, stopped: Stopped) -> None:
        stopped.require({name: value for name, value in self.facts.items() if name != "settings"})
        with writing(self.path, _KEPT):
            _move_out(self.path / NEXT)
            if not (self.path / _BEST).exists():  # it was just being replaced
                for old in self.path.glob(f".{_BEST}.*.old/{_BEST}"):
                    old.rename(self.path / _BEST)
            for pattern in (f"{_PART}*", f".{_BEST}.*"):
                for part in self.path.glob(pattern):
                    shutil.rmtree(part, ignore_errors=True)
            os.truncate(self.path / LOG, stopped.log_bytes)
        self._best = max(record.test_accuracy for record in stopped.epochs)
        self._done = len(stopped.epochs)
        self._started = True

    def on_step(self, step: int) -> None:  # noqa: ARG002 - the observer's signature
        """Note which weights are active now; a method may move them at every step."""
        if self._explored is not None:
            self._explored.look()

    def on_pause(self, epoch: int) -> None:  # noqa: ARG002
        """Note it for the end."""
        self._paused = True

    def on_reallocation(self, step: int, moved: Reallocation) -> None:
        """Log it."""
        self._log(
            "reallocation",
            step=step,
            dropped=dict(zip(self._names, moved.dropped.counts, strict=True)),
            grown=dict(zip(self._names, moved.grown.counts, strict=True)),
            **moved.facts,
        )

    def on_epoch(self, model: SparseModel, record: EpochRecord) -> None:
        """Log the epoch; what is logged but not saved yet is cut off again when the run is resumed."""
        explored = self._explored.counts() if self._explored else {}
        self._log("epoch", **asdict(record), explored=explored)
        if self._best is None or record.test_accuracy > self._best:
            with writing(self.path, _KEPT):
                save_folder(model, self.path / _BEST, force=True)
            self._best = record.test_accuracy

    def on_state(self, model: SparseModel, state: Mapping[str, Any]) -> None:
        """Save model and training together."""
        model.check()
        with writing(self.path, _KEPT):
            _sync([self.path / LOG])
            more = {
                "log_bytes": (self.path / LOG).stat().st_size,
                "explored": self._explored.bits() if self._explored else {},
            }
            _replace_model(model, {"training": state, **more}, self.path)
        self._done = int(state["epoch"])
        self._forget_replaced()

    def _forget_replaced(self) -> None:
        if self._replaced is not None:
            shutil.rmtree(self._replaced.parent, ignore_errors=True)
            self._replaced = None

    def _undo(self) -> None:
        """Remove a run in which nothing was learnt, and put back what it replaced."""
        if self._started:
            shutil.rmtree(self.path, ignore_errors=True)
        if self._replaced is not None:
            self._replaced.rename(self.path)
            self._replaced.parent.rmdir()

    def _log(self, kind: str, **values: Any) -> None:
        with writing(self.path, _KEPT), (self.path / LOG).open("a", encoding="utf-8") as file:
            file.write(_line(kind, values))


def _line(kind: str, values: Mapping[str, Any]) -> str:
    return json.dumps({"kind": kind, **_finite(values)}, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """The same without numbers that JSON does not know; what a method states may hold some, too."""
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _replace_model(model: SparseModel, state: Mapping[str, Any], folder: Path) -> None:
    """Put the files of a model and its training in the place of those in `folder`, all of them or none.

    They are written into a folder of their own, whose renaming to `.next` decides: from then on what lies there
    counts before what lies beside it.
    """
    part = Path(tempfile.mkdtemp(prefix=_PART, dir=folder))
    try:
        write_model(model, part)
        write_state(part / CHECKPOINT, state)
        _sync(part.iterdir())
        part.rename(folder / NEXT)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    try:
        _move_out(folder / NEXT)
    except KeyboardInterrupt:
        _move_out(folder / NEXT)
        raise


def _sync(files: Iterable[Path]) -> None:
    """Have the disk take files before others rely on them: a power cut must not leave new names on no bytes."""
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())


def _move_out(folder: Path) -> None:
    """Move all files of a folder to the folder around it."""
    if folder.exists():
        for file in folder.iterdir():
            file.replace(folder.parent / file.name)
        folder.rmdir()
