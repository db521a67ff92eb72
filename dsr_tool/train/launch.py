"""Starts or resumes a training in a run folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsr_tool.errors import CheckFailed
from dsr_tool.sparse.model import SparseModel
from dsr_tool.train.class_weights import class_weights, uneven_note
from dsr_tool.train.data import Data
from dsr_tool.train.event_log import EventLog
from dsr_tool.train.failures import require_classifier
from dsr_tool.train.fine_tuning import announcement, few_steps, starts_trained
from dsr_tool.train.loop import train
from dsr_tool.train.progress import Progress
from dsr_tool.train.ranks import Follower, Ranks
from dsr_tool.train.records import TrainResult
from dsr_tool.train.run import RunFolder
from dsr_tool.train.settings import TrainSettings
from dsr_tool.train.storage import apply_storage, storage_line
from dsr_tool.train.teacher import Teacher, open_teacher

__all__ = ["train_in_folder"]


def train_in_folder(
    run: RunFolder | Follower,
    model: SparseModel,
    data: Data,
    given: Mapping[str, Any],
    *,
    facts: Mapping[str, Any],
    log: str | None = None,
    quiet: bool = False,
    deadline: float = math.inf,
) -> tuple[TrainSettings, TrainResult]:
    """Trains a model and leaves the run in a folder.

    Args:
        run: the run folder, or its `Follower` on ranks other than 0.
        model: the model to train; when `run` resumes, the one loaded from the folder.
        data: the data, opened for this model.
        given: arguments of `TrainSettings`; when `run` resumes, they must agree with those of the start.
        facts: plain values for `settings.json` and the log: where model and data came from.
        log: another log to write, one of `event_log.LOGS`; None for none.
        quiet: show no progress.
        deadline: reading of `time.monotonic()` by which to stop, see `train`.

    Returns:
        The settings with all defaults filled in, and all epochs of the run, those of earlier calls included.

    Raises:
        UsageError: the model is a detector; tensorboard is not installed and asked for; a setting is not allowed, or
            differs from those of the run to resume; or the teacher does.
        DsrError: see `train`.
    """
    require_classifier(model.module)
    stopped = run.stopped
    settings = stopped.settings(given) if stopped else TrainSettings(**given)
    settings = settings.resolve(data.dataset.augment, trained=starts_trained(model.config))
    steps = settings.epochs * data.steps(settings.batch_size)
    settings.require_update(steps)
    teacher = open_teacher(settings.teacher, model) if settings.teacher is not None else None
    found = _found(data, settings, teacher)
    settings, against = apply_storage(model, settings)
    # First of the observers: an epoch whose events are written before its checkpoint is dropped or kept with that.
    events = [] if log is None else [EventLog(Path(run.path), stopped)]
    logged = {} if log is None else {"log": log}
    run.facts = {**facts, **logged, **found, "settings": settings.to_dict()}
    before = stopped.epochs if stopped else ()
    Ranks.current().wait()  # until every rank has read the files that rank 0 changes from here on
    images = min(settings.batch_size, data.sizes["train_images"])
    # Rank 0 alone says what is the same for all.
    quiet = quiet or not Ranks.current().first
    with run, Progress(settings.epochs, images, done=len(before), quiet=quiet) as progress:
        if settings.fine_tune:
            progress.note(announcement(settings))
            if line := few_steps(settings, steps):
                progress.note(line)
        progress.note(storage_line(model, against))
        if not stopped and "class_weights" not in given and (line := uneven_note(data.dataset)):
            progress.note(line)
        state = stopped.state if stopped else None
        result = train(model, data, settings, [*events, run, progress], teacher=teacher, state=state, deadline=deadline)
    start = stopped.start_accuracy if stopped else result.start_accuracy
    return settings, TrainResult((*before, *result.epochs), start)


def _found(data: Data, settings: TrainSettings, teacher: Teacher | None) -> dict[str, Any]:
    """Returns what a run records of its data and its teacher, so that a resume notices others; see `resume.FOUND`.

    Raises:
        CheckFailed: the user's own data differ between the processes.
    """
    found: dict[str, Any] = {} if teacher is None else {"teacher_sha256": teacher.checksum}
    weights = class_weights(settings.class_weights, data.dataset)
    if weights is not None:
        found["class_weights"] = list(weights)
    if checksum := data.dataset.checksum:
        found["data_sha256"] = checksum
        labels = [part.labels.to(settings.torch_device) for part in (data.dataset.train, data.dataset.test)]
        if not Ranks.current().agree(labels):
            raise CheckFailed(
                "the labels or the split of --data differ between the processes; let the callable return the same on "
                "each. The generators of torch, numpy and Python are seeded when it is called."
            )
    return {**found, **data.sizes}
