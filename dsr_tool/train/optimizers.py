"""The optimizer and its learning rate schedule, from the settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn, optim

from dsr_tool.sparse.compact.store import CompactStore
from dsr_tool.train.settings import TrainSettings

__all__ = ["load_optimizer", "lr_factor", "make_optimizer", "optimizer_state"]


def make_optimizer(module: nn.Module, settings: TrainSettings, *, shrinks: bool = False) -> optim.Optimizer:
    """Returns an optimizer of all parameters of a module, at the peak learning rate.

    Args:
        module: the network.
        settings: checked settings.
        shrinks: whether the active values will be fewer than their parameter has room for, until a resume.
    """
    parameters, lr, decay = list(module.parameters()), settings.learning_rate, settings.weight_decay
    # With AVX2, a fused step on a CPU rounds the last values of a parameter in another way than those before them. A
    # resumed run has a shorter parameter if the active values shrink, so it would not end with the same bits.
    exact = settings.torch_device.type == "cuda" or not shrinks
    fused = True if exact and _can_be_fused(parameters, settings) else None
    momentum = settings.resolved_momentum or 0.0
    if settings.optimizer == "sgd":
        return optim.SGD(parameters, lr, momentum=momentum, nesterov=momentum > 0, weight_decay=decay, fused=fused)
    if settings.optimizer == "rmsprop":
        return optim.RMSprop(parameters, lr, momentum=momentum, weight_decay=decay)
    kind = optim.Adam if settings.optimizer == "adam" else optim.AdamW
    return kind(parameters, lr, weight_decay=decay, fused=fused)


def _can_be_fused(parameters: list[nn.Parameter], settings: TrainSettings) -> bool:
    """Returns whether torch's fused kernels may be used, which step many parameters with fewer passes over memory."""
    if settings.precision == "fp16":  # fused steps unscale gradients inside, and some methods read true ones before
        return False
    # A fused CPU step walks through memory linearly, so parameter and gradient must have one memory format.
    return settings.torch_device.type == "cuda" or all(parameter.is_contiguous() for parameter in parameters)


def optimizer_state(optimizer: optim.Optimizer, store: CompactStore | None) -> dict[str, Any]:
    """Returns the state of an optimizer, to be saved.

    In compact storage it ends where the active values end: a method that lowers the density leaves zeros behind them,
    for which a model that is loaded anew has no room.
    """
    state = optimizer.state_dict()
    if store is None or store.active == store.values.numel():
        return state
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    index = next(i for i, parameter in enumerate(parameters) if parameter is store.values)
    saved = {
        name: value[: store.active] if isinstance(value, torch.Tensor) and value.ndim else value
        for name, value in state["state"].get(index, {}).items()
    }
    return {**state, "state": {**state["state"], index: saved}}


def load_optimizer(optimizer: optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Loads a state that was read from a file, where parameter numbers are text and all tensors are row-major.

    Raises:
        KeyError, TypeError, ValueError: the state is from another optimizer.
    """
    optimizer.load_state_dict({**state, "state": {int(index): values for index, values in state["state"].items()}})
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                # Fused steps need state and parameter in one memory format, such as channels last.
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def lr_factor(settings: TrainSettings, steps_per_epoch: int) -> Callable[[int], float]:
    """Returns the learning rate after a number of steps, as a fraction of its peak: warmup, then cosine or steps."""
    warmup = round(settings.warmup_epochs * steps_per_epoch)
    total = settings.epochs * steps_per_epoch
    milestones = settings.milestones or tuple(settings.epochs * part for part in (0.3, 0.6, 0.8))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if settings.schedule == "step":
            passed: int = sum(step >= round(milestone * steps_per_epoch) for milestone in milestones)
            return settings.gamma**passed
        # The schedule is asked once more after the last step, hence the bound of 1.
        return (1 + math.cos(math.pi * min((step - warmup) / max(total - warmup, 1), 1.0))) / 2

    return factor
