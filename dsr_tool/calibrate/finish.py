"""The last pass of a calibration: all active weights together learn from the dense network, with the masks fixed.

Reconstruction fits each layer by itself and to the very pictures that it saw. This pass shows both networks other views
of them, and lowers the distance of outputs and features end to end.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from dsr_tool.calibrate.distillation import Distillation
from dsr_tool.calibrate.views import views
from dsr_tool.errors import UsageError

__all__ = ["Finished", "finish"]

_LEARNING_RATE = 5e-5
"""Largest step of Adam. On a reconstructed MobileNetV2 at .7 and 112 pixels, four epochs took the KL to dense on other
pictures from 2.19 to 2.14; 1e-4 and 3e-4 ended at 2.17 and 2.54 after two, and norms alone only got worse."""

_BETAS = (0.9, 0.99)
"""Of Adam. The pass has some sixty steps, over which 0.999 would hardly average."""

_WARM_UP = 0.1
"""Share of the steps in which the learning rate rises: Adam's second moments are noise in the first of them."""

_BATCH = 16
"""Pictures per step."""

_PART = 8
"""Pictures that are in memory together. ResNet-50 at 224 pixels then peaks 1.2 GB above what it starts with."""

_HELD = 8
"""One of so many pictures judges the pass and is not trained on, unless there are pictures for that."""


@dataclass(frozen=True)
class Finished:
    """What a pass did.

    Attributes:
        losses: objective on the held pictures at the start and after each epoch, NaN where it was not finite; empty
            if nothing could be compared.
        kept: number of epochs after which the network was best, and is now; 0 if the pass was undone.
    """

    losses: tuple[float, ...]
    kept: int

    @property
    def undone(self) -> bool:
        """Whether the network is as it was."""
        return self.kept == 0

    @property
    def before(self) -> float:
        """Objective on the held pictures at the start; NaN if nothing could be compared."""
        return self.losses[0] if self.losses else math.nan

    @property
    def after(self) -> float:
        """Objective on the held pictures of the network that is kept; NaN if nothing could be compared."""
        return self.losses[self.kept] if self.losses else math.nan


def finish(
    module: nn.Module,
    dense: nn.Module,
    masks: Mapping[str, torch.Tensor],
    pictures: torch.Tensor,
    *,
    held: torch.Tensor | None = None,
    epochs: int = 4,
    learning_rate: float = _LEARNING_RATE,
    seed: int = 0,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Finished:
    """Trains the active weights, biases and norms of a sparse network towards the dense one, in place.

    Statistics of norms stay as they are, and so do inactive weights, training flags, gradients and memory formats. The
    network that is best on the held pictures is kept, be it the one at the start.

    Args:
        module: the sparse network; its inactive weights are zero.
        dense: the same network before it became sparse.
        masks: for each sparse weight, True where active, by name.
        pictures: inputs, shape (pictures, *input_shape).
        held: inputs that judge the pass as they are. They should be new to the network: one that was fitted to them can
            hardly get better there. By default, views of one of eight `pictures`, which is then not trained on.
        epochs: passes over the pictures, each time in another view.
        learning_rate: largest step of Adam.
        seed: seed of the order and the views.
        on_progress: receives the number of pictures that were trained on, and of all.

    Raises:
        UsageError: there are no pictures, an option is not allowed, or an inactive weight is not zero.
    """
    _check(module, masks, pictures, held, epochs)
    if held is None:
        # Spread over all of them, in case that they are sorted.
        judges = torch.arange(len(pictures)) % _HELD == _HELD - 1
        # So few pictures are all trained on, and judge as well.
        pictures, held = (pictures[~judges], pictures[judges]) if judges.any() else (pictures, pictures)
        # A reconstruction fits the pictures that it saw almost exactly, so they judge in a view that it did not see.
        generator = torch.Generator().manual_seed(seed)
        held = torch.cat([views(picture, generator) for picture in held.split(1)])
    with _trainable(module), _evaluating(dense):
        run = _Run(module, dense, masks, pictures, held, epochs, learning_rate, seed)
        return run.result(on_progress)


class _Run:
    """One pass.

    Attributes:
        module: the sparse network.
        steps: number of optimizer steps.
    """

    def __init__(
        self,
        module: nn.Module,
        dense: nn.Module,
        masks: Mapping[str, torch.Tensor],
        pictures: torch.Tensor,
        held: torch.Tensor,
        epochs: int,
        learning_rate: float,
        seed: int,
    ) -> None:
        self.module = module
        self._pictures, self._held, self._epochs = pictures, held, epochs
        self._objective = Distillation(module, dense, pictures[:1])
        self._generator = torch.Generator().manual_seed(seed)
        parameters = dict(module.named_parameters())
        self._inactive = [(parameters[name], ~mask) for name, mask in masks.items()]
        self._trained = [parameter for parameter in parameters.values() if parameter.requires_grad]
        self._optimizer = torch.optim.Adam(self._trained, lr=learning_rate, betas=_BETAS)
        self.steps = epochs * math.ceil(len(pictures) / _BATCH)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, self._rate)

    def result(self, on_progress: Callable[[int, int], None]) -> Finished:
        """Trains, judges after each epoch, and leaves the best network."""
        losses = [self._judge()]
        if math.isnan(losses[0]):
            return Finished((), 0)
        kept, best = 0, self._copy()
        for epoch in range(self._epochs):
            trained = self._train(epoch, on_progress)
            losses.append(self._judge() if trained else math.nan)
            if math.isnan(losses[-1]):
                break
            if losses[-1] < losses[kept]:
                kept, best = epoch + 1, self._copy()
        with torch.no_grad():
            for parameter, value in zip(self._trained, best, strict=True):
                parameter.copy_(value)
        return Finished(tuple(losses), kept)

    def _rate(self, step: int) -> float:
        """Returns the share of the largest learning rate: a linear warm-up, then half a cosine down to zero."""
        warm = max(1, round(_WARM_UP * self.steps))
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))

    def _train(self, epoch: int, on_progress: Callable[[int, int], None]) -> bool:
        """Trains for one epoch; returns False, at once, when a loss is NaN or inf."""
        count = len(self._pictures)
        order = torch.randperm(count, generator=self._generator)
        done = epoch * count
        for chosen in order.split(_BATCH):
            if not self._step(views(self._pictures[chosen], self._generator)):
                return False
            done += len(chosen)
            on_progress(done, self._epochs * count)
        return True

    def _step(self, batch: torch.Tensor) -> bool:
        """Takes one step; returns False, without one, when the loss is NaN or inf."""
        self._optimizer.zero_grad()
        for part in batch.split(_PART):
            loss = self._objective.loss(_channels_last(part))
            if loss is None or not math.isfinite(loss.item()):
                return False
            (loss * (len(part) / len(batch))).backward()
        for weight, inactive in self._inactive:
            # Adam leaves a zero alone whose gradients were all zero.
            if weight.grad is not None:
                weight.grad.masked_fill_(inactive, 0.0)
        self._optimizer.step()
        self._schedule.step()
        return True

    @torch.no_grad()
    def _judge(self) -> float:
        """Returns the objective on the held pictures as they are; NaN if it is not finite or nothing is compared."""
        total = 0.0
        for part in self._held.split(_PART):
            loss = self._objective.loss(_channels_last(part.clone()))
            if loss is None or not math.isfinite(loss.item()):
                return math.nan
            total += loss.item() * len(part) / len(self._held)
        return total

    def _copy(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self._trained]


def _channels_last(inputs: torch.Tensor) -> torch.Tensor:
    """Returns pictures channels last, which halves the time of a pass; the weights may stay as they are."""
    return inputs.contiguous(memory_format=torch.channels_last) if inputs.dim() == 4 else inputs


@contextlib.contextmanager
def _trainable(module: nn.Module) -> Iterator[None]:
    """Makes all real parameters trainable, with norms and dropout as in inference; gives every flag and gradient back.

    Norms keep their statistics: those of a batch are noise for a network that was fitted to fixed ones.
    """
    with _evaluating(module):
        state = [(parameter, parameter.requires_grad, parameter.grad) for parameter in module.parameters()]
        for parameter, _, _ in state:
            parameter.grad = None
            parameter.requires_grad_(parameter.is_floating_point())
        try:
            with torch.enable_grad():
                yield
        finally:
            for parameter, flag, gradient in state:
                parameter.requires_grad_(flag)
                parameter.grad = gradient


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Puts a module into eval mode, and gives every training flag back."""
    training = {child: child.training for child in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for child, mode in training.items():
            child.training = mode


def _check(
    module: nn.Module,
    masks: Mapping[str, torch.Tensor],
    pictures: torch.Tensor,
    held: torch.Tensor | None,
    epochs: int,
) -> None:
    if len(pictures) == 0 or (held is not None and len(held) == 0):
        raise UsageError("there are no pictures to finish on; give at least one.")
    if epochs < 1:
        raise UsageError(f"epochs {epochs} is not 1 or more; leave the pass out instead.")
    parameters = dict(module.named_parameters())
    for name, mask in masks.items():
        if name not in parameters or parameters[name].shape != mask.shape:
            raise UsageError(
                f"mask {name!r} of shape {tuple(mask.shape)} fits no parameter; give the network's own masks."
            )
        if torch.count_nonzero(parameters[name].detach().masked_fill(mask, 0.0)):
            raise UsageError(f"weight {name!r} has non-zero values outside its mask; set them to zero before.")
