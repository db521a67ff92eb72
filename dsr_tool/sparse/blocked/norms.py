"""Steps of batch norms, with the sum and the activation that follow them."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, fx, nn

from dsr_tool.sparse.blocked.context import Context, Run
from dsr_tool.sparse.blocked.norm import norm_act
from dsr_tool.sparse.blocked.operations import Operation
from dsr_tool.sparse.blocked.values import Registers, Value, value_at

__all__ = ["function_step", "norm_step"]


def norm_step(
    norm: fx.Node, context: Context, *, out: fx.Node, residual: fx.Node | None, activation: tuple[str, float],
    apart: list[Run],
) -> Run:  # fmt: skip
    """Returns the step of an nn.BatchNorm1d or 2d with what follows it.

    Args:
        norm: the node of the norm.
        context: the network.
        out: the last node of the step, whose register it writes.
        residual: what is added to the norm, or None.
        activation: name and slope of the activation; `none` for none.
        apart: the steps of all its nodes, for inputs that the kernel does not take.
    """
    module = cast(nn.BatchNorm2d, context.module(norm))
    source, place = context.places[cast(fx.Node, norm.args[0])], context.places[out]
    other = None if residual is None else context.places[residual]
    rank = 2 if isinstance(module, nn.BatchNorm1d) else 4
    parameters, buffers, (name, slope) = module._parameters, module._buffers, activation

    def run(registers: Registers) -> None:
        value = value_at(registers, source)
        added = None if other is None else value_at(registers, other)
        fits = value is not None and value.rank == rank and value.shape[1] == module.num_features
        if value is None or not fits or (other is not None and (added is None or added.shape != value.shape)):
            for step in apart:
                step(registers)
            return
        training, momentum = module.training, _momentum(module, buffers)
        kept = not training or module.track_running_stats
        mean, variance = (buffers["running_mean"], buffers["running_var"]) if kept else (None, None)
        x = value.image
        made = norm_act(
            x, parameters["weight"], parameters["bias"], mean, variance, training=training, momentum=momentum,
            eps=module.eps, images=value.images, residual=None if added is None else added.image, activation=name,
            slope=slope,
        )  # fmt: skip
        registers[place] = value.same(made if rank == 4 else made.view(*made.shape[:2], made.shape[4]))

    return run


def _momentum(module: nn.BatchNorm2d, buffers: dict[str, Tensor | None]) -> float | None:
    """Counts a batch in training. Returns the share of it in the running statistics."""
    if not module.training or not module.track_running_stats:
        return module.momentum
    counter = buffers["num_batches_tracked"]
    if counter is None:
        return module.momentum or 0.0
    counter.add_(1)
    return 1.0 / float(counter) if module.momentum is None else module.momentum


def function_step(operation: Operation, node: fx.Node, context: Context, otherwise: Run) -> Run | None:
    """Returns the step of `functional.batch_norm`, or None if an argument that must be known is computed."""
    given = operation.arguments
    if any(isinstance(given[key], fx.Node) for key in ("training", "momentum", "eps")):
        return None
    source, out = context.place(given["input"]), context.places[node]
    if source is None:
        return None
    places = [context.place(given[key]) for key in ("weight", "bias", "running_mean", "running_var")]
    options = {"training": given["training"], "momentum": given["momentum"], "eps": given["eps"]}

    def run(registers: Registers) -> None:
        value = value_at(registers, source)
        tensors = [None if place is None else registers[place] for place in places]
        known = all(each is None or (type(each) is not Value and each.dtype is torch.float32) for each in tensors)
        if value is None or value.rank != 4 or not known:
            otherwise(registers)
            return
        registers[out] = value.same(norm_act(value.image, *tensors, images=value.images, **options))

    return run
