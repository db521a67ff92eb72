"""Reading a stopped training from its run folder, to resume it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from dsr_tool.errors import FileError, FormatError, UsageError
from dsr_tool.sparse.folder import current_file
from dsr_tool.train.checkpoint import CHECKPOINT, read_state
from dsr_tool.train.records import EpochRecord
from dsr_tool.train.settings import LEARNING_RATES, MOMENTA, TrainSettings

__all__ = ["FOUND", "LOG", "SETTINGS", "Stopped", "find_stopped"]

LOG, SETTINGS = "log.jsonl", "settings.json"

FOUND = (
    *("recipe", "cell", "teacher_sha256", "class_weights", "data_sha256", "train_images", "test_images", "classes"),
)
"""Keys of `settings.json` that say where a run came from or what it found, not what it was asked to do."""

_MAY_DIFFER = ("device", "workers", "teacher", "class_weights")
"""Settings that may be changed when a run resumes: they say where it is computed, or where teacher and class weights
are, not what. Teacher and class weights themselves are compared by `Stopped.require`."""


@dataclass(frozen=True)
class Stopped:
    """A training that completed at least one epoch.

    Attributes:
        path: its run folder.
        facts: content of its `settings.json`.
        started: settings that it was started with.
        epochs: records of the complete epochs.
        state: state to pass to `train`.
        log_bytes: length of its log at the end of the last complete epoch.
        start_accuracy: fraction of test images that its model classified before the first step; None in old logs.
        explored: packed bits of the weights that were ever active until then, as `Exploration.bits` returns them.
    """

    path: Path
    facts: Mapping[str, Any]
    started: TrainSettings
    epochs: tuple[EpochRecord, ...]
    state: Mapping[str, Any]
    log_bytes: int
    start_accuracy: float | None
    explored: Mapping[str, torch.Tensor]

    def settings(self, given: Mapping[str, Any]) -> TrainSettings:
        """Returns the settings of the run.

        Args:
            given: arguments of `TrainSettings` that the user gives again.

        Raises:
            UsageError: one of them differs from the run's.
        """
        # to_dict has lists where the user's settings have tuples; options are given next to settings.
        lists = {name: getattr(self.started, name) for name in ("milestones", "doubling")}
        known = {**self.started.to_dict(), **lists, **self.started.options}
        for name, value in {**given, **given.get("options", {})}.items():
            # `auto` chose what the run has.
            if name in ("options", *_MAY_DIFFER) or known.get(name) == value or (name, value) == ("storage", "auto"):
                continue
            option = f"--{name.replace('_', '-')} {value}"
            difference = (
                f"{option} differs from the {known[name]} that {str(self.path)!r} was started with"
                if name in known
                else f"{option} was not given when {str(self.path)!r} was started"
            )
            raise UsageError(f"{difference}; leave it out to resume, or give another folder to train from the start.")
        return replace(self.started, **{name: given[name] for name in _MAY_DIFFER if name in given})

    def require(self, facts: Mapping[str, Any]) -> None:
        """Raises `UsageError` if model or data are not those that the run was started with."""
        for name, value in facts.items():
            if name == "teacher_sha256" and self.facts.get(name) != value:
                raise UsageError(
                    f"{str(self.path)!r} was not started with this --teacher: its weights are others; give the same "
                    f"weights to resume, or another folder to train from the start."
                )
            if name == "data_sha256" and self.facts.get(name) != value:
                raise UsageError(
                    f"{str(self.path)!r} was started with other labels or another split of its --data; let the "
                    f"callable return the same to resume, or give another folder to train from the start."
                )
            if self.facts.get(name) != value and name != "class_weights":
                raise UsageError(
                    f"{str(self.path)!r} was started with {name} {self.facts.get(name)!r}, not {value!r}; give the "
                    f"same model and --data to resume, or another folder to train from the start."
                )
        # Last, since other data have other weights; and of both, since a run without weights has no such fact.
        if self.facts.get("class_weights") != facts.get("class_weights"):
            raise UsageError(
                f"{str(self.path)!r} was not started with these --class-weights; give the same to resume, or another "
                f"folder to train from the start."
            )


def find_stopped(path: Path) -> Stopped | None:
    """Returns the run in a folder, or None if no training in it completed an epoch.

    Raises:
        FileError: the folder holds something, but not a run.
        FormatError: the run is damaged.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return None
    if not (path / LOG).is_file():
        raise FileError(f"{str(path)!r} is not a run that could be resumed: it has no {LOG}; give a run folder.")
    file = current_file(path, CHECKPOINT)
    if not file.is_file():
        # A run may be killed between logging its first epoch and saving it. A longer log means that the file was lost.
        log = (path / LOG).read_bytes()
        if log.count(b'{"kind": "epoch"') > 1 or b'{"kind": "end"' in log:
            raise FileError(
                f"{str(path)!r} has no {CHECKPOINT}, so it cannot be resumed; train again in another folder."
            )
        return None
    state = read_state(file)
    try:
        lines = _complete_lines(path, state)
        epochs = _complete_epochs(lines, state)
        facts = json.loads((path / SETTINGS).read_text(encoding="utf-8"))
        explored = {name: bits for name, bits in state["explored"].items() if isinstance(bits, torch.Tensor)}
        started = _parse_settings(facts["settings"])
        accuracy = lines[0].get("start_accuracy")
        return Stopped(path, dict(facts), started, epochs, state["training"], state["log_bytes"], accuracy, explored)
    except (OSError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise FormatError(
            f"run {str(path)!r} is damaged and cannot be resumed ({error}); train again in another folder."
        ) from error


def _complete_lines(path: Path, state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Reads the lines of the log up to a checkpoint; raises `ValueError` if some are missing."""
    # Lines after the last checkpoint belong to an epoch that will be trained again.
    log = (path / LOG).read_bytes()[: state["log_bytes"]]
    if len(log) < state["log_bytes"]:
        raise ValueError(f"{LOG} is shorter than {CHECKPOINT} says")
    return [json.loads(line) for line in log.splitlines()]


def _complete_epochs(lines: list[dict[str, Any]], state: Mapping[str, Any]) -> tuple[EpochRecord, ...]:
    """Returns the records of the epochs in a checkpoint; raises `ValueError` if the log's lines disagree."""
    epochs = tuple(
        EpochRecord(**{name: value for name, value in line.items() if name not in ("kind", "explored")})
        for line in lines
        if line["kind"] == "epoch"
    )
    if [record.epoch for record in epochs] != list(range(1, state["training"]["epoch"] + 1)):
        raise ValueError(f"{LOG} does not hold the epochs of {CHECKPOINT}")
    return epochs


def _parse_settings(values: Mapping[str, Any]) -> TrainSettings:
    """Returns the settings of a run, checked except for what depends on the machine."""
    known = {field.name for field in fields(TrainSettings)}
    # Runs from before there were other defaults for trained weights, storages or memory formats go on with what they
    # started with.
    given: dict[str, Any] = {"fine_tune": False, "storage": "masked", "channels_last": False}
    given |= {name: value for name, value in values.items() if name in known}
    if given.get("optimizer") in LEARNING_RATES.keys() - MOMENTA:
        given["momentum"] = None  # old runs recorded a momentum even for optimizers that have none
    settings = TrainSettings(**given)
    settings = replace(settings, milestones=tuple(settings.milestones), doubling=tuple(settings.doubling))
    replace(settings, device="cpu", precision="fp32").check()
    return settings
