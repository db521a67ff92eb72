"""Records of a training: one per epoch, the result of all, and the observer that is notified on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dsr_tool.methods import Reallocation
from dsr_tool.sparse.model import SparseModel

__all__ = ["EpochRecord", "Moved", "Observer", "Start", "TrainResult"]


@dataclass(frozen=True)
class EpochRecord:
    """Figures of one epoch.

    Attributes:
        epoch: number of the epoch, from 1.
        step: optimizer steps since the start, without those that overflowed in fp16.
        train_loss: mean loss over the steps, auxiliary losses included.
        train_accuracy: fraction of training images classified correctly while the weights changed.
        test_loss: mean loss over all test images.
        test_accuracy: fraction of all test images classified correctly.
        lr: learning rate at the end.
        time_s: duration in seconds, evaluation included.
        active_weights: active weights of all sparse layers.
        density: fraction of active weights by layer.
        dropped: number of weights pruned in this epoch by layer.
        grown: number of weights grown in this epoch by layer.
        threshold: threshold of the method at its last reallocation; None for methods without one.
        facts: figures of the method's last update by name.
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

    def totals(self, prunable: int) -> dict[str, float]:
        """Returns figures of all sparse layers together, by name.

        Args:
            prunable: number of prunable weights of the model.

        Returns:
            `sparsity`, the fraction of zeros among the prunable weights, and how many weights were `dropped` and
            `grown`.
        """
        sparsity = 1 - self.active_weights / prunable if prunable else 0.0
        return {"sparsity": sparsity, "dropped": sum(self.dropped.values()), "grown": sum(self.grown.values())}


@dataclass(frozen=True)
class Start:
    """Figures of the model before its first step.

    Attributes:
        test_accuracy: fraction of all test images classified correctly.
        test_loss: mean loss over all test images; may be NaN or inf.
        doubt: warning if the model comes from trained weights and only guesses; empty if it does not.
    """

    test_accuracy: float
    test_loss: float
    doubt: str = ""


@dataclass
class Moved:
    """Totals of the reallocations of one epoch.

    Attributes:
        dropped: number of weights pruned per sparse layer.
        grown: number of weights grown per sparse layer.
        facts: figures of the last reallocation by name.
    """

    dropped: list[int]
    grown: list[int]
    facts: dict[str, float] = field(default_factory=dict)

    @classmethod
    def nothing(cls, model: SparseModel) -> Moved:
        """Returns the totals at the beginning of an epoch."""
        return cls([0] * len(model.trained), [0] * len(model.trained))

    def add(self, moved: Reallocation) -> None:
        """Adds one reallocation."""
        self.dropped = [a + b for a, b in zip(self.dropped, moved.dropped.counts, strict=True)]
        self.grown = [a + b for a, b in zip(self.grown, moved.grown.counts, strict=True)]
        self.facts = moved.facts


@dataclass(frozen=True)
class TrainResult:
    """All epochs of a training.

    Attributes:
        epochs: the records, in order; at least one.
        start_accuracy: fraction of test images classified correctly before the first step; None if the training was
            resumed, or started before this was measured.
    """

    epochs: tuple[EpochRecord, ...]
    start_accuracy: float | None = None

    @property
    def last(self) -> EpochRecord:
        """The last epoch, whose weights the model has."""
        return self.epochs[-1]

    @property
    def best(self) -> EpochRecord:
        """The first epoch with the highest test accuracy."""
        return max(self.epochs, key=lambda record: record.test_accuracy)


class Observer:
    """Base class of what is notified while a training runs; each method does nothing by default."""

    def on_evaluated_start(self, start: Start) -> None:
        """Is called before `on_start` of a training that is not resumed."""

    def on_start(self, model: SparseModel, total_steps: int) -> None:
        """Is called before the first step, with the model in its initial state."""

    def on_step(self, step: int) -> None:
        """Is called after each optimizer step, which a GPU may still be computing."""

    def on_reallocation(self, step: int, moved: Reallocation) -> None:
        """Is called after each reallocation, except for methods that update at every step."""

    def on_epoch(self, model: SparseModel, record: EpochRecord) -> None:
        """Is called after each epoch, when it has been evaluated and checked."""

    def on_state(self, model: SparseModel, state: Mapping[str, Any]) -> None:
        """Is called after `on_epoch` with the state from which `train(..., state=...)` resumes."""

    def on_pause(self, epoch: int) -> None:
        """Is called at the end if the deadline leaves no time for the epochs after this one."""
