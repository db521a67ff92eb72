"""The optimizer and its learning rate, as the settings say."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn, optim

from dsr_tool.train.settings import TrainSettings

__all__ = ["lr_factor", "make_optimizer"]


def make_optimizer(module: nn.Module, settings: TrainSettings) -> optim.Optimizer:
    """An optimizer of all parameters of a module, at the peak learning rate."""
    parameters, lr, decay = module.parameters(), settings.learning_rate, settings.weight_decay
    if settings.optimizer == "sgd":
        momentum = settings.momentum
        return optim.SGD(parameters, lr, momentum=momentum, nesterov=momentum > 0, weight_decay=decay)
    if settings.optimizer == "rmsprop":
        return optim.RMSprop(parameters, lr, momentum=settings.momentum, weight_decay=decay)
    kind = optim.Adam if settings.optimizer == "adam" else optim.AdamW
    return kind(parameters, lr, weight_decay=decay)


def lr_factor(settings: TrainSettings, steps_per_epoch: int) -> Callable[[int], float]:
    """The learning rate after so many steps, as a fraction of its peak."""
    warmup = round(settings.warmup_epochs * steps_per_epoch)
    total = settings.epochs * steps_per_epoch
    milestones = settings.milestones or tuple(settings.epochs * part for part in (0.3, 0.6, 0.8))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if settings.schedule == "step":
            passed: int = sum(step >= round(milestone * steps_per_epoch) for milestone in milestones)
            return settings.gamma**passed
        return (1 + math.cos(math.pi * min((step - warmup) / max(total - warmup, 1), 1.0))) / 2

    return factor
