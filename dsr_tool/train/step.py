"""One optimizer step, and everything that it changes besides the model: optimizer, schedule, loss scale, method."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import optim

from dsr_tool.errors import FormatError, first_line
from dsr_tool.methods import Attached, Reallocation
from dsr_tool.sparse.model import SparseModel
from dsr_tool.train.device import compiled
from dsr_tool.train.evaluation import training_loss
from dsr_tool.train.optimizers import load_optimizer, lr_factor, make_optimizer, optimizer_state
from dsr_tool.train.ranks import Ranks
from dsr_tool.train.replicas import common_tensors, replicate, without_sync
from dsr_tool.train.rounding import RoundedWeights
from dsr_tool.train.settings import PRECISIONS, TrainSettings
from dsr_tool.train.teacher import Teacher
from exporters.values import GRID_BITS

__all__ = ["NonFiniteLossError", "Stepper"]


class NonFiniteLossError(ArithmeticError):
    """Signals that the loss of a batch is NaN or inf, before it reached any weight."""


class Stepper:
    """Takes the optimizer steps of one training.

    Attributes:
        model: the sparse model, on its device.
        optimizer: optimizer of all parameters.
        attached: the method, attached to the optimizer.
    """

    def __init__(
        self,
        model: SparseModel,
        settings: TrainSettings,
        *,
        classes: int,
        steps_per_epoch: int,
        on_reallocation: Callable[[int, Reallocation], None],
        teacher: Teacher | None = None,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        """Moves the model to its device, and makes what trains it there.

        Args:
            model: the sparse model; changed in place.
            settings: checked settings.
            classes: number of classes of the data.
            steps_per_epoch: optimizer steps per epoch, from which learning rate and method take their schedules.
            on_reallocation: called with the step and the reallocation after each update of the method.
            teacher: network whose outputs are learned from; moved to the device. None for labels alone.
            class_weights: factors on the loss of an image by its class; None for 1.

        Raises:
            UsageError: the model or the settings do not fit the method.
        """
        self.model = model
        self._settings, self._classes = settings, classes
        self._ranks = Ranks.current()
        device = settings.torch_device
        # First of all: the optimizer must see the parameters that are on the device.
        model.to(device, memory_format=settings.memory_format)
        self._teacher = teacher
        self._class_weights = None if class_weights is None else torch.tensor(class_weights, device=device)
        if teacher is not None:
            teacher.module.to(device)
            teacher.module.to(memory_format=settings.memory_format)
        method = settings.make_method(steps_per_epoch * settings.epochs)
        shrinks = model.store is not None and method.final_sparsity is not None
        self.optimizer = make_optimizer(model.module, settings, shrinks=shrinks)
        self._scheduler = optim.lr_scheduler.LambdaLR(self.optimizer, lr_factor(settings, steps_per_epoch))
        self._scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
        self._ranks.require_equal(common_tensors(model))
        # Two images, because batch normalisation needs as many.
        example = torch.zeros(2, *model.config.input_shape, device=device)
        # Compiled inside, so that ranks run the same code as a process alone.
        self._forward = replicate(compiled(model.module, settings), model.module, example)
        self.attached = Attached(
            model, self.optimizer, method, seed=settings.seed, on_reallocation=self._on_reallocation
        )
        self._notify = on_reallocation
        bits = GRID_BITS.get(settings.values)
        self._rounding = RoundedWeights(model, bits) if bits else None

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        lr: float = self.optimizer.param_groups[0]["lr"]
        return lr

    def step(self, inputs: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes one optimizer step, on the whole batch or on parts of it one after the other.

        Args:
            inputs: this rank's share of the batch, shape (batch, *input_shape).
            labels: class numbers, shape (batch,).

        Returns:
            The mean loss, and the scores (batch, classes), both detached and on the device.

        Raises:
            NonFiniteLossError: on one CPU process, the loss is NaN or inf; nothing was changed.
            UsageError: the model's outputs are not scores.
        """
        # Before the forward pass: a CUDA graph may write its outputs where the last gradients are.
        self.optimizer.zero_grad()
        count = self._settings.accumulate
        *earlier, last = zip(inputs.chunk(count), labels.chunk(count), strict=True)
        with self.rounded():
            with without_sync(self._forward):
                results = [self._add_gradients(*part) for part in earlier]
            results.append(self._add_gradients(*last))
        if self._settings.l1:
            self._add_l1()
        before = self.attached.step
        self._scaler.step(self.optimizer)
        self._scaler.update()
        # GradScaler skips steps whose gradients overflowed; the schedule must not advance then.
        if self.attached.step > before:
            self._scheduler.step()
        losses, scores = zip(*results, strict=True)
        return torch.stack(losses).mean(), torch.cat(scores)

    def rounded(self) -> AbstractContextManager[None]:
        """Has passes, evaluations and folders that are written inside see the weights that the settings ask for."""
        return nullcontext() if self._rounding is None else self._rounding.rounded()

    def choose_scales(self) -> None:
        """Has the next pass choose the scales of rounded weights anew, as the first after a resume does."""
        if self._rounding is not None:
            self._rounding.choose_again()

    def settle(self) -> None:
        """Leaves the weights as the passes of the settings see them: rounded for good, if they are."""
        if self._rounding is not None:
            self._rounding.settle()

    def _on_reallocation(self, step: int, moved: Reallocation) -> None:
        self.choose_scales()
        self._notify(step, moved)

    def _add_gradients(self, inputs: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds the gradients of a part of the batch. Returns its mean loss, and its scores."""
        precision, parts = PRECISIONS[self._settings.precision], self._settings.accumulate
        mixed = torch.autocast(inputs.device.type, precision) if precision != torch.float32 else nullcontext()
        if self._settings.compile:
            torch.compiler.cudagraph_mark_step_begin()
        with mixed:
            # The teacher is not compiled: its forward pass has no gradients, and a second graph would cost minutes.
            taught = None if self._teacher is None else self._teacher(inputs)
            outputs = self._forward(inputs)
            loss, scores = training_loss(outputs, labels, self._classes, self._settings, taught, self._class_weights)
        # Stop before the step spreads it to all weights. Reading the loss would stall a GPU, so there the loop looks at
        # many losses at once, later.
        if loss.device.type == "cpu" and self._ranks.count == 1 and not math.isfinite(loss.item()):
            raise NonFiniteLossError
        # Each part has as many images, so the mean of their gradients is that of the whole batch.
        self._scaler.scale(loss / parts).backward()
        # A CUDA graph writes the scores of the next part where these are.
        return loss.detach(), scores.detach().clone() if parts > 1 else scores.detach()

    @torch.no_grad()
    def _add_l1(self) -> None:
        """Adds the gradient of the L1 penalty, l1 times the sign of each weight of a sparse layer."""
        # Not a term of the loss: the logged loss stays that of the data, as with weight decay, and inactive weights are
        # zero, so they get nothing. After backward(), so that ranks have averaged theirs; all of them add the same.
        store = self.model.store
        for weight in self.model.weights.values() if store is None else (store.values,):
            if weight.grad is not None:
                weight.grad.add_(self._scaler.scale(weight.sign().mul_(self._settings.l1)))

    def state(self) -> dict[str, Any]:
        """Returns all that the next step depends on, besides the model."""
        return {
            "trained": self._trained_names(),
            "optimizer": optimizer_state(self.optimizer, self.model.store),
            "scheduler": self._scheduler.state_dict(),
            "scaler": self._scaler.state_dict(),
            "method": self.attached.state_dict(masks=False),
            # The model folder holds the rounded weights.
            **({} if self._rounding is None else {"weights": self._rounding.state()}),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Loads what `state` returned; raises `FormatError` if it is from another model or training."""
        try:
            if state["trained"] != self._trained_names():
                raise ValueError("other parameters are frozen")
            load_optimizer(self.optimizer, state["optimizer"])
            self._scheduler.load_state_dict(state["scheduler"])
            self._scaler.load_state_dict(state["scaler"])
            self.attached.load_state_dict(state["method"])
            if self._rounding is not None:
                self._rounding.load_state(state["weights"])
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise FormatError(
                f"the checkpoint does not fit this model ({first_line(error)}); resume with the model of the run, or "
                f"train again in another folder."
            ) from error

    def close(self) -> None:
        """Detaches the method and frees the gradients."""
        self.attached.remove()
        # Frees the hooks on the parameters that averaged gradients: another training of the model adds its own.
        self._forward = self.model.module
        self.optimizer.zero_grad()

    def _trained_names(self) -> list[str]:
        """Names of the parameters that are not frozen. A model folder does not say which are."""
        names = [name for name, parameter in self.model.module.named_parameters() if parameter.requires_grad]
        return names if self.model.store is None else [*names, *self.model.store.trained]
