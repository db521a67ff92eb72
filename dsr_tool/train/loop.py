"""The training loop. It is the same on CPU and GPU, and a sparse step does nothing that a dense step would not do."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from dsr_tool.errors import DsrError, FormatError
from dsr_tool.methods import Reallocation
from dsr_tool.sparse.model import SparseModel
from dsr_tool.train.class_weights import class_weights
from dsr_tool.train.data import Data
from dsr_tool.train.device import on_device
from dsr_tool.train.evaluation import evaluate
from dsr_tool.train.failures import diverged, explained, first_bad, first_bad_step, require_budget, require_end
from dsr_tool.train.fine_tuning import doubt, starts_trained
from dsr_tool.train.ranks import Ranks
from dsr_tool.train.records import EpochRecord, Moved, Observer, Start, TrainResult
from dsr_tool.train.replicas import common_tensors
from dsr_tool.train.settings import TrainSettings
from dsr_tool.train.step import NonFiniteLossError, Stepper
from dsr_tool.train.storage import apply_storage
from dsr_tool.train.teacher import Teacher, open_teacher

__all__ = ["train"]

_CHECK_EVERY = {"cpu": 100, "cuda": 1000}
"""Steps between checks of the losses by device, since reading them makes the host wait for a GPU."""


def train(
    model: SparseModel,
    data: Data,
    settings: TrainSettings,
    observers: Sequence[Observer] = (),
    *,
    teacher: Teacher | None = None,
    state: Mapping[str, Any] | None = None,
    deadline: float = math.inf,
) -> TrainResult:
    """Trains a model in place, at the number of active weights that its method prescribes.

    On a GPU, fp32 means what torch means by it: matmuls in fp32, convolutions in TF32 where the GPU has it.

    Args:
        model: the model; moved to the device, and its config gets the preprocessing of the data.
        data: the data, opened for this model.
        settings: all settings; checked first.
        observers: observers to notify of steps and epochs; on several processes, only those of rank 0.
        teacher: network whose outputs are learned from; by default that of the settings, if they name one.
        state: what `Observer.on_state` received at the end of an epoch of the same training, to resume from there; on
            the CPU, the result is the same to the last bit.
        deadline: reading of `time.monotonic()` by which to stop. After the first epoch of this call, no epoch starts
            that would end later if it took as long as the one before.

    Returns:
        The epochs of this call.

    Raises:
        UsageError: a setting is not allowed, or the model or data do not fit it.
        FormatError: the state is from another model or training, or a file of class weights is wrong.
        DsrError: the loss is NaN or inf, the GPU's memory ran out, or the model cannot be compiled.
        CheckFailed: something else changed the masks, or the method did not reach its final sparsity.
    """
    settings.check()
    settings = settings.resolve(data.dataset.augment, trained=starts_trained(model.config))
    model.config = data.describe(model.config)
    before = model.storage
    try:
        settings, _ = apply_storage(model, settings, state)
        return _train(model, data, settings, observers, teacher, state, deadline)
    finally:
        model.to_storage(before)


def _train(
    model: SparseModel,
    data: Data,
    settings: TrainSettings,
    observers: Sequence[Observer],
    teacher: Teacher | None,
    state: Mapping[str, Any] | None,
    deadline: float,
) -> TrainResult:
    if teacher is None and settings.teacher is not None:
        teacher = open_teacher(settings.teacher, model)
    device = settings.torch_device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), on_device(settings):
        training = _Training(model, data, settings, observers, teacher)
        try:
            accuracy = training.start(state)
            epochs = tuple(training.epochs(deadline))
            training.stepper.settle()
            return TrainResult(epochs, accuracy)
        except RuntimeError as error:
            if known := explained(error, settings):
                raise known from error
            raise
        finally:
            training.stepper.close()
            model.module.eval()


class _Training:
    """One training: its epochs, and who is notified of them."""

    def __init__(
        self,
        model: SparseModel,
        data: Data,
        settings: TrainSettings,
        observers: Sequence[Observer],
        teacher: Teacher | None,
    ) -> None:
        self.model, self.data, self.settings = model, data, settings
        self.ranks = Ranks.current()
        self.ranks.part(min(settings.batch_size, len(data.dataset.train.labels)), settings.accumulate)  # refuses
        self.observers = observers if self.ranks.first else ()
        self.steps = data.steps(settings.batch_size)
        classes = data.dataset.num_classes
        self.stepper = Stepper(
            model,
            settings,
            classes=classes,
            steps_per_epoch=self.steps,
            on_reallocation=self._on_reallocation,
            teacher=teacher,
            class_weights=class_weights(settings.class_weights, data.dataset),
        )
        self.attached = self.stepper.attached
        self.moved = Moved.nothing(model)
        self.done = 0
        self.budget = model.active_weights

    def start(self, state: Mapping[str, Any] | None) -> float | None:
        """Evaluates the model that a training starts from, or loads the state of one to resume.

        Returns:
            The fraction of test images classified correctly before the first step; None for a training to resume.
        """
        start = self._evaluate_start() if state is None else None
        for observer in self.observers:
            if start is not None:
                observer.on_evaluated_start(start)
            observer.on_start(self.model, self.steps * self.settings.epochs)
        if state is not None:
            self.load_state(state)
        return start.test_accuracy if start else None

    def _evaluate_start(self) -> Start:
        """Evaluates the model, so that one which a conversion has ruined is seen before hours are spent on it."""
        self._seed_draws(0)
        with self.stepper.rounded():
            loss, accuracy = evaluate(self.model, self.data, self.settings)
        labels = self.data.dataset.test.labels
        counts = torch.bincount(labels, minlength=self.data.dataset.num_classes).tolist()
        return Start(accuracy, loss, doubt(self.model.config, accuracy, counts))

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.stepper.load_state(state)
        try:
            self.done = int(state["epoch"])
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError("the checkpoint does not say its epoch; train again in another folder.") from error

    def epochs(self, deadline: float) -> Iterator[EpochRecord]:
        """Trains for the remaining epochs, as many as fit before the deadline."""
        for number in range(self.done + 1, self.settings.epochs + 1):
            start = time.monotonic()
            yield self.epoch(number)
            now = time.monotonic()
            # Clocks differ between processes, and all must stop after the same epoch.
            late = self.ranks.first_says(2 * now - start > deadline, self.settings.torch_device)
            if late and number < self.settings.epochs:
                for observer in self.observers:
                    observer.on_pause(number)
                return

    def epoch(self, number: int) -> EpochRecord:
        """Trains for one epoch, evaluates, checks the result, and notifies the observers."""
        start = time.perf_counter()
        self.moved = Moved.nothing(self.model)
        train_loss, train_accuracy = self._train(number)
        self.ranks.follow_first(self.model.module.buffers())
        self.ranks.require_equal(common_tensors(self.model))
        self.stepper.choose_scales()
        with self.stepper.rounded():
            return self._evaluated(number, start, train_loss, train_accuracy)

    def _evaluated(self, number: int, start: float, train_loss: float, train_accuracy: float) -> EpochRecord:
        """Evaluates after an epoch, checks the result, and notifies the observers."""
        test_loss, test_accuracy = evaluate(self.model, self.data, self.settings)
        if not math.isfinite(test_loss):
            inputs, _ = next(iter(self.data.test_batches(self.settings)))
            raise self._diverged(f"on the test images after epoch {number}", inputs)
        active, sizes = self.model.counts, self.model.sizes
        require_budget(sum(active.values()), self.budget, number)
        if number == self.settings.epochs:
            require_end(self.attached, self.steps * number)
        record = EpochRecord(
            epoch=number,
            step=self.attached.step,
            train_loss=train_loss,
            train_accuracy=train_accuracy,
            test_loss=test_loss,
            test_accuracy=test_accuracy,
            lr=self.stepper.lr,
            time_s=time.perf_counter() - start,
            active_weights=self.budget,
            density={name: count / sizes[name] for name, count in active.items()},
            dropped=dict(zip(self.attached.names, self.moved.dropped, strict=True)),
            grown=dict(zip(self.attached.names, self.moved.grown, strict=True)),
            threshold=self.moved.facts.get("threshold"),
            facts=self.moved.facts,
        )
        self.done = number
        for observer in self.observers:
            observer.on_epoch(self.model, record)
            observer.on_state(self.model, {"epoch": number, **self.stepper.state()})
        return record

    def _train(self, number: int) -> tuple[float, float]:
        """Takes all steps of an epoch. Returns mean loss and accuracy, which stay on the device until the end."""
        device = self.settings.torch_device
        self._seed_draws(number)
        self.stepper.choose_scales()
        self.model.module.train()
        losses = torch.zeros(self.steps, device=device)
        correct = torch.zeros((), dtype=torch.int64, device=device)
        seen, first = 0, (number - 1) * self.steps + 1
        for index, (inputs, labels) in enumerate(self.data.train_batches(self.settings, number)):
            try:
                loss, scores = self.stepper.step(inputs, labels)
            except NonFiniteLossError:
                raise self._diverged(f"at step {self.attached.step + 1}", inputs) from None
            losses[index] = loss
            correct += (scores.argmax(1) == labels).sum()
            seen += len(labels)
            if (index + 1) % _CHECK_EVERY[device.type] == 0 or index + 1 == self.steps:
                totals = self.ranks.total(losses[: index + 1])
                step = first_bad_step(totals, first)
                if step is not None:
                    raise self._diverged(f"at step {step}, as seen at step {first + index}", inputs)
            for observer in self.observers:
                observer.on_step(first + index)
        ranks = self.ranks.count
        return totals.mean().item() / ranks, self.ranks.total(correct).item() / (seen * ranks)

    def _seed_draws(self, number: int) -> None:
        """Seeds draws of the model, as for dropout, by seed, epoch and rank alone, so a resumed run draws the same."""
        drawn = [self.settings.seed, number, *([self.ranks.rank] if self.ranks.rank else [])]
        torch.manual_seed(int(np.random.SeedSequence(drawn).generate_state(1)[0]))

    def _diverged(self, when: str, inputs: torch.Tensor) -> DsrError:
        saves = any(type(observer).on_state is not Observer.on_state for observer in self.observers)
        return diverged(when, first_bad(self.model.module, inputs), self.done if saves else 0)

    def _on_reallocation(self, step: int, moved: Reallocation) -> None:
        self.moved.add(moved)
        self.budget += len(moved.grown.flat) - len(moved.dropped.flat)
        # A method that updates at every step would fill the log; its epoch records have the totals.
        for observer in () if self.attached.method.continuous else self.observers:
            observer.on_reallocation(step, moved)
