"""What methods read of an optimizer: the sizes of its steps, and its momentum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import optim

from dsr_tool.sparse.model import SparseModel

__all__ = ["step_sizes"]


def step_sizes(model: SparseModel, optimizer: optim.Optimizer, names: Sequence[str]) -> list[float]:
    """Returns the step size of each sparse layer: how far a constant gradient of 1 moves a weight in one step.

    That is the learning rate, divided by 1 - momentum for an optimizer with momentum. Adam and RMSprop divide by the
    size of the gradient as well, so for them it is an upper bound.

    Args:
        model: the sparse model.
        optimizer: the optimizer of its weights. Its groups are read anew, since schedules and resumed runs change them.
        names: names of the sparse layers.
    """
    # By identity, since a tensor compares by its values.
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    store = model.store
    layers: Mapping[str, torch.Tensor] = model.weights if store is None else store.by_layer or {}
    # In compact storage all layers may share one vector of values.
    shared = {} if store is None else groups.get(id(store.values), {})
    return [_step_size(groups.get(id(layers.get(name)), shared)) for name in names]


def _step_size(group: dict[str, float]) -> float:
    momentum, dampening = (float(group.get(name) or 0.0) for name in ("momentum", "dampening"))
    return float(group["lr"]) * (1 - dampening * (momentum > 0)) / (1 - momentum)
