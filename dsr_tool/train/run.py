"""RunFolder: what a training leaves on disk, loadable at every moment."""

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

from dsr_tool.core.config import installed_versions
from dsr_tool.core.files import new_folder, refuse_existing, writing
from dsr_tool.errors import FileError
from dsr_tool.methods import Reallocation
from dsr_tool.sparse.folder import CONFIG, NEXT, save_folder, write_model
from dsr_tool.sparse.model import SparseModel
from dsr_tool.train.records import EpochRecord, Observer

__all__ = ["LOG", "SETTINGS", "RunFolder"]

LOG, SETTINGS = "log.jsonl", "settings.json"
_BEST = "best"
_KEPT = "what was saved before is whole"


class RunFolder(Observer):
    """A model folder of the last complete epoch, with `log.jsonl`, `settings.json` and `best/` beside it.

    It is made whole before the first step, with the model as it is then, and removed again when no epoch was completed.

    Attributes:
        path: the folder.
        facts: plain values for `settings.json` and the log, set before the training starts: its settings, where
            model and data came from.
    """

    def __init__(self, path: str | Path, *, force: bool = False) -> None:
        """Check that the folder can be made; nothing is written yet.

        Args:
            path: the new folder.
            force: replace an existing folder.

        Raises:
            FileError: it exists and is not empty, without `force` or with something else in it, or cannot be made.
        """
        self.path = Path(path)
        self.facts: dict[str, Any] = {}
        self._force = force
        refuse_existing(self.path, force=force, marker=CONFIG)
        self._best: float | None = None
        self._done = 0
        self._started = False
        self._replaced: Path | None = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and not self._done:
            self._undo()
            return
        if not self._started:
            return
        status = "complete" if kind is None else "interrupted" if kind is KeyboardInterrupt else "failed"
        try:
            self._log("end", status=status, epochs=self._done, best_accuracy=self._best)
        except FileError:
            # What went wrong before is the error to show.
            if kind is None:
                raise

    def on_start(self, model: SparseModel, total_steps: int) -> None:
        """Make the folder."""
        model.check()
        start = {
            **self.facts,
            "versions": installed_versions(),
            "total_steps": total_steps,
            "parameters": model.parameters,
            "prunable_weights": model.prunable_weights,
            "active_weights": model.active_weights,
        }
        if self._force and self.path.is_dir():
            # Kept until an epoch is complete: a run that learns nothing must not cost an older one.
            self._replaced = self.path.with_name(f".{self.path.name}.replaced.{os.getpid()}")
            with writing(self.path):
                self.path.rename(self._replaced)
        with new_folder(self.path, marker=CONFIG) as part:
            write_model(model, part)
            (part / SETTINGS).write_text(json.dumps(self.facts, indent=1) + "\n", encoding="utf-8")
            (part / LOG).write_text(_line("start", start), encoding="utf-8")
        self._started = True
        self._names = model.trained

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
        """Save the state, then log the epoch."""
        model.check()
        with writing(self.path, _KEPT):
            _replace_model(model, self.path)
            if self._best is None or record.test_accuracy > self._best:
                save_folder(model, self.path / _BEST, force=True)
                self._best = record.test_accuracy
        self._done = record.epoch
        if self._replaced is not None:
            shutil.rmtree(self._replaced, ignore_errors=True)
            self._replaced = None
        self._log("epoch", **asdict(record))

    def _undo(self) -> None:
        """Remove a run in which nothing was learnt, and put back what it replaced."""
        if self._started:
            shutil.rmtree(self.path, ignore_errors=True)
        if self._replaced is not None:
            self._replaced.rename(self.path)

    def _log(self, kind: str, **values: Any) -> None:
        with writing(self.path, _KEPT), (self.path / LOG).open("a", encoding="utf-8") as file:
            file.write(_line(kind, values))


def _line(kind: str, values: Mapping[str, Any]) -> str:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    return json.dumps({"kind": kind, **finite}, allow_nan=False) + "\n"


def _replace_model(model: SparseModel, folder: Path) -> None:
    """Put a model's files in the place of those in `folder`, all of them or none.

    They are written into a folder of their own, whose renaming to `.next` decides: from then on what lies there
    counts before what lies beside it.
    """
    part = Path(tempfile.mkdtemp(prefix=".part.", dir=folder))
    try:
        write_model(model, part)
        part.rename(folder / NEXT)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    try:
        _move_out(folder / NEXT)
    except KeyboardInterrupt:
        _move_out(folder / NEXT)
        raise


def _move_out(folder: Path) -> None:
    """Move all files of a folder to the folder around it."""
    if folder.exists():
        for file in folder.iterdir():
            file.replace(folder.parent / file.name)
        folder.rmdir()
