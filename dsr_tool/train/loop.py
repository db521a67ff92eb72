"""The training loop: the same on CPU and GPU, and nothing in a step that a dense step would not do."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import optim

from dsr_tool.errors import DsrError, FormatError, first_line
from dsr_tool.methods import Attached, Reallocation
from dsr_tool.sparse.model import SparseModel
from dsr_tool.train.data import Data
from dsr_tool.train.device import compiled, on_device
from dsr_tool.train.evaluation import evaluate, training_loss
from dsr_tool.train.failures import diverged, explained, first_bad, require_budget, require_end, stepped_off
from dsr_tool.train.optimizers import load_optimizer, lr_factor, make_optimizer
from dsr_tool.train.ranks import Ranks
from dsr_tool.train.records import EpochRecord, Moved, Observer, TrainResult
from dsr_tool.train.settings import PRECISIONS, TrainSettings

__all__ = ["train"]

_LOOK_EVERY = {"cpu": 100, "cuda": 1000}
"""Steps between looks at the losses, for which the host must wait for a GPU."""


def train(
    model: SparseModel,
    data: Data,
    settings: TrainSettings,
    observers: Sequence[Observer] = (),
    *,
    state: Mapping[str, Any] | None = None,
    deadline: float = math.inf,
) -> TrainResult:
    """Train a model in place, at an unchanged number of active weights.

    On a GPU, fp32 is what torch calls so: products of matrices in fp32, convolutions in TF32 where the GPU has it.

    Args:
        model: what to train; it is moved to the device, and its description takes on the data's preprocessing.
        data: what to train on, opened for this model.
        settings: how.
        observers: who is told.
        state: what `Observer.on_state` was given when an earlier training with the same data and settings left this
            model; it goes on from there, on the CPU to the same bits.
        deadline: reading of `time.monotonic()` by which to stop: no epoch is begun, but for the first of this call,
            that would end later if it took as long as the one before.

    Returns:
        The epochs of this call.

    Raises:
        UsageError: settings that are not allowed.
        FormatError: a state of another model or training.
        DsrError: the loss is no longer finite, the GPU's memory ran out, or the model cannot be compiled.
        CheckFailed: the number of active weights changed, or the method did not come to its final sparsity.
    """
    settings.check()
    model.config = data.describe(model.config)
    device = settings.torch_device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), on_device(settings):
        run = _Run(model, data, settings, observers)
        try:
            if state is not None:
                run.restore(state)
            return TrainResult(tuple(run.epochs(deadline)))
        except RuntimeError as error:
            if known := explained(error, settings):
                raise known from error
            raise
        finally:
            run.attached.remove()
            run.optimizer.zero_grad()
            model.module.eval()


class _Run:
    """One training: optimizer, schedule and method, made after the model is on its device."""

    def __init__(self, model: SparseModel, data: Data, settings: TrainSettings, observers: Sequence[Observer]) -> None:
        self.model, self.data, self.settings = model, data, settings
        self.ranks = Ranks.current()
        self.ranks.part(min(settings.batch_size, len(data.dataset.train.labels)))
        self.observers = observers if self.ranks.first else ()
        device = settings.torch_device
        model.to(device, memory_format=settings.memory_format)
        self.steps = data.steps(settings.batch_size)
        self.optimizer = make_optimizer(model.module, settings)
        self.scheduler = optim.lr_scheduler.LambdaLR(self.optimizer, lr_factor(settings, self.steps))
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
        self.forward: Callable[[torch.Tensor], Any] = compiled(model.module, settings)
        total = self.steps * settings.epochs
        method = settings.make_method(total)
        self.attached = Attached(model, self.optimizer, method, seed=settings.seed, on_reallocation=self._on_move)
        self.moved = Moved.nothing(model)
        self.done = 0
        self.budget = model.active_weights
        for observer in self.observers:
            observer.on_start(model, total)

    def epochs(self, deadline: float) -> Iterator[EpochRecord]:
        """Train for all epochs that are left, as far as there is time."""
        for number in range(self.done + 1, self.settings.epochs + 1):
            start = time.monotonic()
            yield self.epoch(number)
            now = time.monotonic()
            late = self.ranks.first_says(2 * now - start > deadline, self.settings.torch_device)
            if late and number < self.settings.epochs:
                for observer in self.observers:
                    observer.on_pause(number)
                return

    def epoch(self, number: int) -> EpochRecord:
        """Train for one epoch, evaluate, and tell the observers."""
        start = time.perf_counter()
        self.moved = Moved.nothing(self.model)
        train_loss, train_accuracy = self._train(number)
        self.ranks.follow_first(self.model.module.buffers())
        self.ranks.require_equal(self.model.module, self.model.masks)
        test_loss, test_accuracy = evaluate(self.model, self.data, self.settings)
        if not math.isfinite(test_loss):
            inputs, _ = next(iter(self.data.test_batches(self.settings)))
            raise self._diverged(f"on the test images after epoch {number}", inputs)
        active = _active(self.model)
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
            lr=self.optimizer.param_groups[0]["lr"],
            time_s=time.perf_counter() - start,
            active_weights=self.budget,
            density={name: count / self.model.masks[name].numel() for name, count in active.items()},
            dropped=dict(zip(self.attached.names, self.moved.dropped, strict=True)),
            grown=dict(zip(self.attached.names, self.moved.grown, strict=True)),
            threshold=self.moved.facts.get("threshold"),
            facts=self.moved.facts,
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
            load_optimizer(self.optimizer, state["optimizer"])
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
        # Whatever the model draws (dropout) depends on seed, epoch and rank alone.
        drawn = [self.settings.seed, number, *([self.ranks.rank] if self.ranks.rank else [])]
        torch.manual_seed(int(np.random.SeedSequence(drawn).generate_state(1)[0]))
        self.model.module.train()
        losses = torch.zeros(self.steps, device=device)
        right = torch.zeros((), dtype=torch.int64, device=device)
        seen = 0
        for index, (inputs, labels) in enumerate(self.data.train_batches(self.settings, number)):
            loss, outputs = self._step(inputs, labels)
            losses[index] = loss
            right += (outputs.argmax(1) == labels).sum()
            seen += len(labels)
            if (index + 1) % _LOOK_EVERY[device.type] == 0 or index + 1 == self.steps:
                every = self.ranks.total(losses[: index + 1])
                step = stepped_off(every, first=(number - 1) * self.steps + 1)
                if step is not None:
                    seen_at = (number - 1) * self.steps + index + 1
                    raise self._diverged(f"at step {step}, as seen at step {seen_at}", inputs)
            for observer in self.observers:
                observer.on_step((number - 1) * self.steps + index + 1)
        ranks = self.ranks.count
        return every.mean().item() / ranks, self.ranks.total(right).item() / (seen * ranks)

    def _step(self, inputs: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step; the loss and the main outputs, detached."""
        precision = PRECISIONS[self.settings.precision]
        mixed = torch.autocast(inputs.device.type, precision) if precision != torch.float32 else nullcontext()
        # Before the forward, which may be a CUDA graph that writes where the last gradients lie.
        self.optimizer.zero_grad()
        if self.settings.compile:
            torch.compiler.cudagraph_mark_step_begin()
        with mixed:
            outputs = self.forward(inputs)
            loss, scores = training_loss(outputs, labels, self.data.dataset.num_classes, self.settings)
            # Before the step spreads it to all weights; a GPU would have to be waited for, so there it is seen later.
            if loss.device.type == "cpu" and self.ranks.count == 1 and not math.isfinite(loss.item()):
                raise self._diverged(f"at step {self.attached.step + 1}", inputs)
        self.scaler.scale(loss).backward()
        self.ranks.average_gradients(self.model.module.parameters())
        before = self.attached.step
        self.scaler.step(self.optimizer)
        self.scaler.update()
        # The scaler leaves out steps whose gradients overflowed.
        if self.attached.step > before:
            self.scheduler.step()
        return loss.detach(), scores.detach()

    def _diverged(self, when: str, inputs: torch.Tensor) -> DsrError:
        saves = any(type(observer).on_state is not Observer.on_state for observer in self.observers)
        return diverged(when, first_bad(self.model.module, inputs), self.done if saves else 0)

    def _on_move(self, step: int, moved: Reallocation) -> None:
        self.moved.add(moved)
        self.budget += len(moved.grown.flat) - len(moved.dropped.flat)
        for observer in () if self.attached.method.continuous else self.observers:
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
