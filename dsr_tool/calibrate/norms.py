"""Corrects norms and biases for what masks took from the sums before them, from moments alone.

Pruning changes the mean and the variance of a layer's output, and errors of the mean add up over the layers. Both are
known from the moments of the layer's input (Nagel et al., ICCV 2019, section 4.2, for the mean), so the batch norm that
follows can expect them; where none follows, the bias takes the mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from dsr_tool.calibrate.moments import Moments
from dsr_tool.calibrate.signals import Float
from dsr_tool.sparse.model import SparseModel

__all__ = ["Corrected", "correct_norms"]

_LEAST_RATIO = 1e-3
"""Smallest factor on a running variance, so that errors of the mean are not divided by almost nothing."""


@dataclass(frozen=True)
class Corrected:
    """Which layers were corrected.

    Attributes:
        names: weights whose norm or bias was changed.
        left_alone: for each other weight, why.
    """

    names: list[str]
    left_alone: dict[str, str]


@torch.no_grad()
def correct_norms(
    model: SparseModel, dense: Mapping[str, torch.Tensor], moments: Mapping[str, Moments | str]
) -> Corrected:
    """Corrects the norm or bias behind every sparse layer, in place.

    Args:
        model: the model after its masks were applied, and its values changed.
        dense: the weights before that, by name.
        moments: moments of the dense network.
    """
    state = model.module.state_dict()
    names, left = [], {}
    for name in model.masks:
        entry = moments.get(name, "the output does not depend on it")
        if isinstance(entry, str):
            left[name] = entry
        elif reason := _correct(state, name, dense[name], entry):
            left[name] = reason
        else:
            names.append(name)
    return Corrected(names, left)


def _correct(state: Mapping[str, torch.Tensor], name: str, before: torch.Tensor, entry: Moments) -> str:
    """Corrects what follows one layer. Returns why it cannot; empty if it could."""
    old, new = (_by_output(tensor, entry) for tensor in (before, state[name]))
    means, variances = (_by_group(array, entry, old.shape[0]) for array in (entry.mean, entry.variance))
    shift = ((new - old).sum(2) * means).sum(1)
    if entry.norm is None:
        if entry.bias is None:
            return "it has neither a norm nor a bias behind it"
        _add(state[entry.bias], -shift)
        return ""
    full, rest = ((array**2).sum(2) * variances for array in (old, new))
    ratio = rest.sum(1) / np.where(full.sum(1) > 0, full.sum(1), 1)
    mean, variance = (state[part] for part in entry.norm[2:])
    dead = ~new.any((1, 2))
    _add(mean, shift)
    mean[torch.from_numpy(dead)] = 0
    ratio = np.where(dead | (ratio == 0), 1.0, np.maximum(ratio, _LEAST_RATIO))
    variance.mul_(torch.from_numpy(ratio).to(variance))
    return ""


def _by_output(weight: torch.Tensor, entry: Moments) -> Float:
    """Returns a weight with shape (outputs, inputs per group, kernel entries)."""
    array = weight.detach().cpu().double().numpy()
    if entry.transposed:
        grouped = array.reshape(entry.groups, array.shape[0] // entry.groups, array.shape[1], -1)
        array = grouped.swapaxes(1, 2).reshape(-1, grouped.shape[1], grouped.shape[3])
    shaped: Float = array.reshape(array.shape[0], array.shape[1], -1)
    return shaped


def _by_group(values: Float, entry: Moments, outputs: int) -> Float:
    """Returns for each output the values of the inputs that it reads, shape (outputs, inputs per group)."""
    grouped = values.reshape(entry.groups, -1)
    return grouped.repeat(outputs // entry.groups, 0)


def _add(tensor: torch.Tensor, values: Float) -> None:
    tensor.add_(torch.from_numpy(values).to(tensor))
