"""Readers of an optimizer, for methods: they return the sizes of its steps, and its momentum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import optim

from dsr_tool.errors import UsageError
from dsr_tool.sparse.active import ActiveWeights
from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparse.optimizers import OptimizerView

__all__ = ["momentum_of", "step_sizes"]


def step_sizes(model: SparseModel, optimizer: optim.Optimizer, names: Sequence[str]) -> list[float]:
    """Returns the step size of each sparse layer: how far a constant gradient of 1 moves a weight in one step.

    That is the learning rate, divided by 1 - momentum for an optimizer with momentum. Adam and RMSprop divide by the
    size of the gradient as well, which is left out.

    Args:
        model: the sparse model.
        optimizer: the optimizer of its weights. Its groups are read anew, since schedules and resumed runs change them.
        names: names of the sparse layers.

    Raises:
        UsageError: a momentum of 1 or more adds up gradients without end.
    """
    groups = _groups(optimizer)
    used = [groups[id(parameter)] for parameter, _ in _parameters(model, groups, names)]
    endless = next((group["momentum"] for group in used if (group.get("momentum") or 0) >= 1), None)
    if endless is not None:
        raise UsageError(
            f"{type(optimizer).__name__} with momentum {endless} has no step size, which the method reads; give a "
            f"momentum below 1."
        )
    return [_step_size(group) for group in used]


def momentum_of(
    model: SparseModel, optimizer: optim.Optimizer, names: Sequence[str], weights: ActiveWeights
) -> torch.Tensor:
    """Returns the momentum of the active weights in float32, shape (active,); of a kernel, the mean magnitude.

    That is the running mean or sum of gradients that SGD and RMSprop call `momentum_buffer` and Adam `exp_avg`.

    Args:
        model: the sparse model.
        optimizer: the optimizer of its weights, after a step.
        names: names of the sparse layers.
        weights: their active weights.

    Raises:
        UsageError: the optimizer has no momentum.
    """
    places, view = _parameters(model, _groups(optimizer), names), OptimizerView(optimizer)
    buffers = [_buffer(view, parameter) for parameter, _ in places]
    if names and all(buffer is None for buffer in buffers):
        raise UsageError(
            f"the method reads the optimizer's momentum, and this {type(optimizer).__name__} has none; give --momentum "
            f"0.9, or make the optimizer with one."
        )
    units = weights.units or (1,) * len(names)
    pieces = []
    for (_, start), buffer, local, unit in zip(
        places, buffers, weights.positions.weights_of(units).per_layer(), units, strict=True
    ):
        if buffer is None:  # a layer without a gradient so far
            piece = torch.zeros(len(local), device=local.device)
        else:
            piece = (buffer.take(local) if model.store is None else buffer[start : start + len(local)]).float()
        pieces.append(piece if unit == 1 else piece.abs().reshape(-1, unit).mean(1))
    return torch.cat(pieces) if pieces else weights.values


def _groups(optimizer: optim.Optimizer) -> dict[int, Mapping[str, float]]:
    """Returns the group of each parameter by its identity, since a tensor compares by its values."""
    return {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}


def _parameters(
    model: SparseModel, groups: Mapping[int, object], names: Sequence[str]
) -> list[tuple[torch.Tensor, int]]:
    """Returns the parameter of each sparse layer, and the index of the layer's first value in it.

    In compact storage an optimizer has one vector of values for all layers, or one for each.
    """
    store = model.store
    if store is None:
        weights = model.weights
        return [(weights[name], 0) for name in names]
    own: Mapping[str, torch.Tensor] = store.by_layer or {}
    return [
        (own[name], 0) if id(own.get(name)) in groups else (store.values, store.layers[name].start) for name in names
    ]


def _buffer(view: OptimizerView, parameter: torch.Tensor) -> torch.Tensor | None:
    found = (state.get(key) for state in view.states_of(parameter) for key in ("momentum_buffer", "exp_avg"))
    return next((buffer for buffer in found if buffer is not None), None)


def _step_size(group: Mapping[str, float]) -> float:
    momentum, dampening = (float(group.get(name) or 0.0) for name in ("momentum", "dampening"))
    return float(group["lr"]) * (1 - dampening * (momentum > 0)) / (1 - momentum)
