"""What methods read of an optimizer: the sizes of its steps, and its momentum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import optim

from dsr_tool.sparse.model import SparseModel

__all__ = ["parameters_of", "step_sizes"]


def parameters_of(model: SparseModel, names: Sequence[str]) -> list[torch.Tensor]:
    """Returns the parameter of each sparse layer; in compact storage all of them share one vector of values."""
    if model.store is not None:
        return [model.store.values] * len(names)
    weights = model.weights
    return [weights[name] for name in names]


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
    return [_step_size(groups[id(parameter)]) for parameter in parameters_of(model, names)]


def _step_size(group: dict[str, float]) -> float:
    momentum, dampening = (float(group.get(name) or 0.0) for name in ("momentum", "dampening"))
    return float(group["lr"]) * (1 - dampening * (momentum > 0)) / (1 - momentum)
