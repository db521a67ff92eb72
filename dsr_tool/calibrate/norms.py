"""Corrects norms and biases for what masks took from the sums before them, from the weights alone.

Pruning changes the mean and the variance of a layer's output, and the errors add up over the layers. The batch norm
that follows expects them after the correction; where none follows, the bias takes the mean (Nagel et al., ICCV 2019,
section 4.2).

The mean follows from the mean of the layer's input. For the variance, let e be the fraction of sum w^2 Var[x] that the
mask keeps, k the dense running variance divided by that sum, and q the fraction of the input's variance that is still
the dense network's signal, the rest being noise from layers before. Inputs that vary together make k larger than 1;
noise adds up independently. The variance is then e (k q + 1 - q) / k times the dense one, and of the output the
fraction e k q / (k q + 1 - q) is signal. Without q, late layers expect several times too much: on ResNet-18 at sparsity
.8 the KL divergence to the dense network was 4.5, with it 2.9.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from dsr_tool.calibrate.moments import InputMoments, Moments
from dsr_tool.calibrate.signals import Float
from dsr_tool.sparse.compact.change import held_state
from dsr_tool.sparse.in_file import Made
from dsr_tool.sparse.model import SparseModel

__all__ = ["Corrected", "correct_norms"]

_LEAST_RATIO = 1e-3
"""Smallest factor on a running variance, so that errors of the mean are not divided by almost nothing."""
_MOST_TOGETHER = 50.0
"""Largest variance relative to that of independent inputs; rows of almost zero weights have no meaningful one."""
_CHUNK = 1 << 19
"""Weights that are float64 at a time: with their squares and moments, some 20 MB."""


@dataclass(frozen=True)
class Corrected:
    """The layers that were corrected, and those that were not.

    Attributes:
        names: weights whose norm or bias was changed.
        left_alone: for each other weight, why.
    """

    names: list[str]
    left_alone: dict[str, str]


@torch.no_grad()
def correct_norms(model: SparseModel, dense: Mapping[str, torch.Tensor], moments: InputMoments) -> Corrected:
    """Corrects the norm or bias behind every sparse layer, in place.

    Args:
        model: the model after its masks were applied.
        dense: the weights before that, by name; those of sparse layers are needed.
        moments: moments of the dense network.
    """
    # One dense weight at a time in compact storage.
    state = Made({name: make for name, _, make in held_state(model.module)})
    names = list[str]()
    missing = "the output does not depend on it"
    left = {name: f"its input {why}" for name, why in moments.items() if isinstance(why, str) and name in model.masks}
    left |= {name: missing for name in model.masks if name not in moments}

    def follow(name: str, signal: float) -> float:
        entry = moments.get(name, missing)
        if isinstance(entry, str):
            return signal
        before = dense[name] if name in dense else state[name]
        kept = _Kept.of(before, state[name], entry, state, signal)
        # A layer that is used twice is met twice.
        if name in model.masks and name not in names and name not in left:
            if reason := kept.correct(state, entry):
                left[name] = reason
            else:
                names.append(name)
        return kept.signal

    moments.paths.carry(follow)
    return Corrected(names, left)


@dataclass(frozen=True)
class _Kept:
    """The part of a layer's output that a mask keeps.

    Attributes:
        shift: change of the mean per output channel.
        ratio: factor on the variance per output channel; 1 where nothing is left to correct.
        dead: whether an output channel has no active weight.
        signal: fraction of the output's variance that is the dense network's signal, of all channels together.
    """

    shift: Float
    ratio: Float
    dead: npt.NDArray[np.bool_]
    signal: float

    @classmethod
    def of(
        cls, before: torch.Tensor, after: torch.Tensor, entry: Moments, state: Mapping[str, torch.Tensor], signal: float
    ) -> _Kept:
        """Computes it for the fraction of signal in the layer's input."""
        full, rest, shift, alive = _sums(_by_output(before, entry), _by_output(after, entry), entry)
        positive = full > 0
        energy = rest / np.where(positive, full, 1)
        together, weight = np.ones(len(full)), positive.astype(float)
        # A filter of one channel reads its noise as coherently as its signal.
        if entry.norm and entry.measured and entry.groups < len(entry.mean):
            scale, _, _, variance = (state[name].detach().cpu().double().numpy() for name in entry.norm)
            together = np.clip(variance / np.where(positive, full, 1), 1, _MOST_TOGETHER)
            weight = weight * scale**2  # the variance of a channel after the norm
        coherent = together * signal + 1 - signal
        out = np.where(energy > 0, signal * energy * together / np.maximum(coherent, 1e-9), 0)
        mean_out = float((out * weight).sum() / weight.sum()) if weight.any() else signal
        dead = ~alive.astype(bool)
        ratio = np.where(dead | (energy == 0), 1.0, np.maximum(energy * coherent / together, _LEAST_RATIO))
        return cls(shift, ratio, dead, min(mean_out, 1.0))

    def correct(self, state: Mapping[str, torch.Tensor], entry: Moments) -> str:
        """Changes what follows the layer. Returns why it cannot; empty if it could."""
        if entry.norm is not None:
            _, _, mean, variance = (state[name] for name in entry.norm)
            _add(mean, self.shift)
            # The layer's output is zero there, exactly, where moments are only about right.
            mean[torch.from_numpy(self.dead).to(mean.device)] = 0
            variance.mul_(torch.from_numpy(self.ratio).to(variance))
        elif entry.bias is not None:
            _add(state[entry.bias], -self.shift)
        else:
            return "it has neither a norm nor a bias behind it"
        return ""


def _sums(before: torch.Tensor, after: torch.Tensor, entry: Moments) -> Float:
    """Returns what the outputs of a layer are before and after its mask.

    Args:
        before: the dense weight, shape (outputs, inputs per group, kernel entries).
        after: the weight with its zeros.
        entry: moments of the layer's input.

    Returns:
        For each output its variance before, its variance after, the change of its mean, and 1 if a weight is left;
        shape (4, outputs).
    """
    outputs, per_output = before.shape[0], max(before[0].numel(), 1)
    found, step = np.empty((4, outputs)), max(_CHUNK // per_output, 1)
    for start in range(0, outputs, step):
        rows = slice(start, start + step)
        old, new = (weight[rows].double().numpy() for weight in (before, after))
        groups = np.arange(start, start + len(old)) // (outputs // entry.groups)
        means, variances = (array.reshape(entry.groups, -1)[groups] for array in (entry.mean, entry.variance))
        found[:2, rows] = [((array**2).sum(2) * variances).sum(1) for array in (old, new)]
        found[2, rows], found[3, rows] = ((new - old).sum(2) * means).sum(1), new.any((1, 2))
    return found


def _by_output(weight: torch.Tensor, entry: Moments) -> torch.Tensor:
    """Returns a weight with shape (outputs, inputs per group, kernel entries)."""
    weight = weight.detach().cpu()
    if entry.transposed:
        grouped = weight.reshape(entry.groups, weight.shape[0] // entry.groups, weight.shape[1], -1)
        weight = grouped.swapaxes(1, 2).reshape(-1, grouped.shape[1], grouped.shape[3])
    return weight.reshape(weight.shape[0], weight.shape[1], -1)


def _add(tensor: torch.Tensor, values: Float) -> None:
    tensor.add_(torch.from_numpy(values).to(tensor))
