"""What a training tells: a record per epoch, and who listens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dsr_tool.methods import Reallocation
from dsr_tool.sparse.model import SparseModel

__all__ = ["EpochRecord", "Moved", "Observer", "TrainResult"]


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch came to.

    Attributes:
        epoch: its number, the first being 1.
        step: optimizer steps since the start, without those that overflowed in fp16.
        train_loss: mean over its steps, auxiliary losses included.
        train_accuracy: fraction right, as the images went by.
        test_loss: mean over all test images.
        test_accuracy: fraction right of all test images.
        lr: learning rate at its end.
        time_s: its seconds, evaluation included.
        active_weights: of all sparse layers.
        density: fraction of active weights by layer.
        dropped: weights dropped in this epoch by layer.
        grown: weights grown in this epoch by layer.
        threshold: the method's threshold at its last reallocation, where it has one.
        facts: all that the method stated at its last update, by name.
    """

    epoch: int
    step: int
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    lr: float
    time_s: float
    active_weights: int
    density: dict[str, float]
    dropped: dict[str, int]
    grown: dict[str, int]
    threshold: float | None
    facts: dict[str, float] = field(default_factory=dict)


@dataclass
class Moved:
    """What reallocations of one epoch moved, per layer, and what the method stated at the last of them."""

    dropped: list[int]
    grown: list[int]
    facts: dict[str, float] = field(default_factory=dict)

    @classmethod
    def nothing(cls, model: SparseModel) -> Moved:
        """The beginning of an epoch."""
        return cls([0] * len(model.trained), [0] * len(model.trained))

    def add(self, moved: Reallocation) -> None:
        """One more reallocation."""
        self.dropped = [a + b for a, b in zip(self.dropped, moved.dropped.counts, strict=True)]
        self.grown = [a + b for a, b in zip(self.grown, moved.grown.counts, strict=True)]
        self.facts = moved.facts


@dataclass(frozen=True)
class TrainResult:
    """All epochs of a training."""

    epochs: tuple[EpochRecord, ...]

    @property
    def last(self) -> EpochRecord:
        """The last epoch, whose state the model is in."""
        return self.epochs[-1]

    @property
    def best(self) -> EpochRecord:
        """The first epoch of the highest test accuracy."""
        return max(self.epochs, key=lambda record: record.test_accuracy)


class Observer:
    """What is told while a training runs; by itself it does nothing."""

    def on_start(self, model: SparseModel, total_steps: int) -> None:
        """Before the first step, with the model in its initial state."""

    def on_step(self, step: int) -> None:
        """After each optimizer step; results are still on their way on a GPU."""

    def on_reallocation(self, step: int, moved: Reallocation) -> None:
        """After each reallocation."""

    def on_epoch(self, model: SparseModel, record: EpochRecord) -> None:
        """After each epoch, evaluated and checked."""

    def on_state(self, model: SparseModel, state: Mapping[str, Any]) -> None:
        """After that, with all that the training needs to go on from here, for `train(..., state=...)`."""

    def on_pause(self, epoch: int) -> None:
        """At the end, where time was up after this epoch and more are left."""
