"""The training loop: the same on CPU and GPU, and nothing in a step that a dense step would not do."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import optim
from torch.nn.functional import cross_entropy

from dsr_tool.errors import CheckFailed, FormatError, first_line
from dsr_tool.methods import Attached, Reallocation
from dsr_tool.sparse.model import SparseModel
from dsr_tool.train.data import Data
from dsr_tool.train.failures import check_finite, diverged, explained, require_scores
from dsr_tool.train.optimizers import lr_factor, make_optimizer
from dsr_tool.train.records import EpochRecord, Moved, Observer, TrainResult
from dsr_tool.train.settings import PRECISIONS, TrainSettings

__all__ = ["AUXILIARY_WEIGHT", "evaluate", "train"]

AUXILIARY_WEIGHT = 0.3
"""Weight of each auxiliary classifier's loss (Szegedy et al., Going deeper with convolutions, section 5)."""
_LOOK_EVERY = 100


def train(
    model: SparseModel,
    data: Data,
    settings: TrainSettings,
    observers: Sequence[Observer] = (),
    *,
    state: Mapping[str, Any] | None = None,
) -> TrainResult:
    """Train a model in place, at an unchanged number of active weights.

    Args:
        model: what to train; it is moved to the device, and its description takes on the data's preprocessing.
        data: what to train on, opened for this model.
        settings: how.
        observers: who is told.
        state: what `Observer.on_state` was given when an earlier training with the same data and settings left this
            model; it goes on from there, on the CPU to the same bits.

    Returns:
        The epochs of this call.

    Raises:
        UsageError: settings that are not allowed.
        FormatError: a state of another model or training.
        DsrError: the loss is no longer finite, the GPU's memory ran out, or the model cannot be compiled.
        CheckFailed: the number of active weights changed.
    """
    settings.check()
    model.config = data.describe(model.config)
    device = settings.torch_device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        run = _Run(model, data, settings, observers)
        try:
            if state is not None:
                run.restore(state)
            return TrainResult(tuple(run.epoch(number) for number in range(run.done + 1, settings.epochs + 1)))
        except RuntimeError as error:
            if known := explained(error, settings):
                raise known from error
            raise
        finally:
            run.attached.remove()
            model.module.eval()


@torch.no_grad()
def evaluate(model: SparseModel, data: Data, settings: TrainSettings) -> tuple[float, float]:
    """Mean loss and fraction right over all test images, in fp32."""
    model.module.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=settings.torch_device)
    for inputs, labels in data.test_batches(settings):
        outputs = model(inputs)
        loss = cross_entropy(outputs, labels, reduction="sum")
        totals += torch.stack([loss, (outputs.argmax(1) == labels).sum()])
    loss_sum, right = totals.tolist()
    count = len(data.dataset.test.labels)
    return loss_sum / count, right / count


class _Run:
    """One training: optimizer, schedule and method, made after the model is on its device."""

    def __init__(self, model: SparseModel, data: Data, settings: TrainSettings, observers: Sequence[Observer]) -> None:
        self.model, self.data, self.settings, self.observers = model, data, settings, observers
        device = settings.torch_device
        layout = torch.channels_last if device.type == "cuda" else torch.preserve_format
        model.to(device, memory_format=layout)
        self.steps = data.steps(settings.batch_size)
        self.optimizer = make_optimizer(model.module, settings)
        self.scheduler = optim.lr_scheduler.LambdaLR(self.optimizer, lr_factor(settings, self.steps))
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
        self.forward: Callable[[torch.Tensor], Any] = torch.compile(model.module) if settings.compile else model.module
        total = self.steps * settings.epochs
        method = settings.make_method(total)
        self.attached = Attached(model, self.optimizer, method, seed=settings.seed, on_reallocation=self._on_move)
        self.moved = Moved.nothing(model)
        self.done = 0
        self.budget = model.active_weights
        for observer in observers:
            observer.on_start(model, total)

    def epoch(self, number: int) -> EpochRecord:
        """Train for one epoch, evaluate, and tell the observers."""
        start = time.perf_counter()
        self.moved = Moved.nothing(self.model)
        train_loss, train_accuracy = self._train(number)
        test_loss, test_accuracy = evaluate(self.model, self.data, self.settings)
        if not math.isfinite(test_loss):
            raise diverged(number * self.steps)
        active = _active(self.model)
        if sum(active.values()) != self.budget:
            raise CheckFailed(
                f"the model has {sum(active.values()):,} active weights after epoch {number}, not {self.budget:,}; "
                f"something outside the method changed its masks."
            )
        record = EpochRecord(
            epoch=number,
            step=self.attached.step,
            train_loss=train_loss,
            train_accuracy=train_accuracy,
            test_loss=test_loss,
            test_accuracy=test_accuracy,
            lr=self.optimizer.param_groups[0]["lr"],
            time_s=time.perf_counter() - start,
            active_weights=self.budget,
            density={name: count / self.model.masks[name].numel() for name, count in active.items()},
            dropped=dict(zip(self.attached.names, self.moved.dropped, strict=True)),
            grown=dict(zip(self.attached.names, self.moved.grown, strict=True)),
            threshold=self.moved.threshold,
        )
        self.done = number
        for observer in self.observers:
            observer.on_epoch(self.model, record)
            observer.on_state(self.model, self.state())
        return record

    def state(self) -> dict[str, Any]:
        """All that the next epoch depends on, beside the model."""
        return {
            "epoch": self.done,
            "trained": _trained(self.model),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "method": self.attached.state_dict(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        try:
            if state["trained"] != _trained(self.model):
                raise ValueError("other parameters are frozen")
            optimizer = state["optimizer"]
            of = {int(index): values for index, values in optimizer["state"].items()}
            self.optimizer.load_state_dict({**optimizer, "state": of})
            self.scheduler.load_state_dict(state["scheduler"])
            self.scaler.load_state_dict(state["scaler"])
            self.attached.load_state_dict(state["method"])
            self.done = int(state["epoch"])
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise FormatError(
                f"the saved state of the training does not fit this model ({first_line(error)})."
            ) from error

    def _train(self, number: int) -> tuple[float, float]:
        """All steps of an epoch; mean loss and fraction right, which stay on the device until the end."""
        device = self.settings.torch_device
        # Whatever the model draws (dropout) depends on seed and epoch alone.
        torch.manual_seed(int(np.random.SeedSequence([self.settings.seed, number]).generate_state(1)[0]))
        self.model.module.train()
        losses = torch.zeros(self.steps, device=device)
        right = torch.zeros((), dtype=torch.int64, device=device)
        seen = 0
        for index, (inputs, labels) in enumerate(self.data.train_batches(self.settings, number)):
            loss, outputs = self._step(inputs, labels)
            losses[index] = loss
            right += (outputs.argmax(1) == labels).sum()
            seen += len(labels)
            if (index + 1) % _LOOK_EVERY == 0 or index + 1 == self.steps:
                check_finite(losses[: index + 1], first=(number - 1) * self.steps + 1)
            for observer in self.observers:
                observer.on_step((number - 1) * self.steps + index + 1)
        return losses.mean().item(), right.item() / seen

    def _step(self, inputs: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step; the loss and the main outputs, detached."""
        precision = PRECISIONS[self.settings.precision]
        mixed = torch.autocast(inputs.device.type, precision) if precision != torch.float32 else nullcontext()
        with mixed:
            outputs = self.forward(inputs)
            # GoogLeNet and Inception give auxiliary outputs behind the main one while training.
            every = outputs if isinstance(outputs, tuple) else (outputs,)
            require_scores(every[0], self.data.dataset.num_classes)
            smoothing = self.settings.label_smoothing
            main, *auxiliary = (
                cross_entropy(output.float(), labels, label_smoothing=smoothing)
                for output in every
                if output is not None
            )
            loss = main + AUXILIARY_WEIGHT * sum(auxiliary)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        before = self.attached.step
        self.scaler.step(self.optimizer)
        self.scaler.update()
        # The scaler leaves out steps whose gradients overflowed.
        if self.attached.step > before:
            self.scheduler.step()
        return loss.detach(), every[0].detach()

    def _on_move(self, step: int, moved: Reallocation) -> None:
        self.moved.add(moved)
        self.budget += len(moved.grown.flat) - len(moved.dropped.flat)
        for observer in self.observers:
            observer.on_reallocation(step, moved)


def _trained(model: SparseModel) -> list[str]:
    """Names of the parameters that are not frozen, which no file holds."""
    return [name for name, parameter in model.module.named_parameters() if parameter.requires_grad]


def _active(model: SparseModel) -> dict[str, int]:
    """Active weights by layer, with one trip to the host."""
    if not model.masks:
        return {}
    counts: list[int] = torch.stack([mask.count_nonzero() for mask in model.masks.values()]).tolist()
    return dict(zip(model.masks, counts, strict=True))
