"""What a stopped training left, as far as it is needed to go on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from dsr_tool.errors import FileError, FormatError, UsageError
from dsr_tool.sparse.folder import current
from dsr_tool.train.checkpoint import CHECKPOINT, read_state
from dsr_tool.train.records import EpochRecord
from dsr_tool.train.settings import LEARNING_RATES, MOMENTA, TrainSettings

__all__ = ["LOG", "SETTINGS", "Stopped", "find_stopped"]

LOG, SETTINGS = "log.jsonl", "settings.json"

_FREE = ("device", "workers")
"""Settings that may differ from those of the start: where, not what, is computed."""


@dataclass(frozen=True)
class Stopped:
    """A training that completed at least one epoch.

    Attributes:
        path: its run folder.
        facts: its `settings.json`.
        started: the settings in there.
        epochs: the complete epochs.
        state: for `train(..., state=...)`.
        log_bytes: length of its log at the end of the last of them.
        explored: weights that were active at any time until then, as `Exploration.bits` gave them.
    """

    path: Path
    facts: Mapping[str, Any]
    started: TrainSettings
    epochs: tuple[EpochRecord, ...]
    state: Mapping[str, Any]
    log_bytes: int
    explored: Mapping[str, torch.Tensor]

    def settings(self, given: Mapping[str, Any]) -> TrainSettings:
        """The settings of the run, after a look at those that are given again.

        Raises:
            UsageError: one of them differs from the run's.
        """
        lists = {name: getattr(self.started, name) for name in ("milestones", "doubling")}
        own = {**self.started.to_dict(), **lists, **self.started.options}
        asked = {**given, **given.get("options", {})}
        for name, value in asked.items():
            if name in ("options", *_FREE) or own.get(name) == value:
                continue
            was = f"differs from the {own[name]} that" if name in own else "was not given when"
            raise UsageError(
                f"--{name.replace('_', '-')} {value} {was} {str(self.path)!r} was started{' with' * (name in own)}; "
                f"leave it out to resume, or give another folder to train anew."
            )
        return replace(self.started, **{name: given[name] for name in _FREE if name in given})

    def require(self, facts: Mapping[str, Any]) -> None:
        """Raise `UsageError` when model or data are not what the run was started with."""
        for name, value in facts.items():
            if self.facts.get(name) != value:
                raise UsageError(
                    f"{str(self.path)!r} was started with {name} {self.facts.get(name)!r}, not {value!r}; give the "
                    f"same model and --data to resume, or another folder to train anew."
                )


def find_stopped(path: Path) -> Stopped | None:
    """The run in a folder; None where no training completed an epoch.

    Raises:
        FileError: the folder holds something, but no run.
        FormatError: the run is damaged.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return None
    if not (path / LOG).is_file():
        raise FileError(f"{str(path)!r} is no run that could be resumed: it has no {LOG}; give the folder of a run.")
    file = current(path, CHECKPOINT)
    if not file.is_file():
        # A run may have been stopped between logging its first epoch and saving it; one that came further lost a file.
        log = (path / LOG).read_bytes()
        if log.count(b'{"kind": "epoch"') > 1 or b'{"kind": "end"' in log:
            raise FileError(f"{str(path)!r} has no {CHECKPOINT}, without which it cannot be resumed; train anew.")
        return None
    state = read_state(file)
    try:
        log = (path / LOG).read_bytes()[: state["log_bytes"]]
        if len(log) < state["log_bytes"]:
            raise ValueError(f"{LOG} is cut off")
        lines = [json.loads(line) for line in log.splitlines()]
        epochs = tuple(_record(line) for line in lines if line["kind"] == "epoch")
        if [record.epoch for record in epochs] != list(range(1, state["training"]["epoch"] + 1)):
            raise ValueError(f"{LOG} does not hold the epochs of {CHECKPOINT}")
        facts = json.loads((path / SETTINGS).read_text(encoding="utf-8"))
        explored = {name: bits for name, bits in state["explored"].items() if isinstance(bits, torch.Tensor)}
        started = _settings(facts["settings"])
        return Stopped(path, dict(facts), started, epochs, state["training"], state["log_bytes"], explored)
    except (OSError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise FormatError(f"run {str(path)!r} cannot be resumed ({error}); it is damaged, so train anew.") from error


def _record(line: Mapping[str, Any]) -> EpochRecord:
    return EpochRecord(**{name: value for name, value in line.items() if name not in ("kind", "explored")})


def _settings(values: Mapping[str, Any]) -> TrainSettings:
    """The settings of a run, looked at but for what depends on the machine."""
    known = {field.name for field in fields(TrainSettings)}
    given = {name: value for name, value in values.items() if name in known}
    if given.get("optimizer") in LEARNING_RATES.keys() - MOMENTA:
        given["momentum"] = None  # runs once recorded one that their optimizer never had
    settings = TrainSettings(**given)
    settings = replace(settings, milestones=tuple(settings.milestones), doubling=tuple(settings.doubling))
    replace(settings, device="cpu", precision="fp32").check()
    return settings
