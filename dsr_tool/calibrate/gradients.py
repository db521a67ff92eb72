"""Costs of pruning by gradients: one backward pass of a picture gives those of all layers at all densities.

To second order, KL(dense || pruned) = 1/2 E[(g . dW)^2], with g the gradient of log p(class) for a class that is drawn
from the dense network's own output: the Fisher matrix along the change of the weights, without its cross terms between
layers. Other outputs take the relative squared error the same way, along random directions.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from dsr_tool.calibrate.inflow import Inflow
from dsr_tool.errors import UsageError
from dsr_tool.sparse.feeding import float_tensors

__all__ = ["DENSITIES", "PASSES", "differentiable", "gradient_costs", "pruned_sums", "rank"]

DENSITIES: tuple[float, ...] = tuple(np.geomspace(0.01, 1.0, 32).round(5).tolist())
"""Densities at which a layer's cost is known. Neighbours differ by 16 %, less than the noise of the costs."""

_PROBES = 2
"""Backward passes of each picture, which share a forward pass."""

PASSES = 2 + 2 * _PROBES
"""Time for one picture in forward passes: one for the means of inputs, one forward, two for each backward pass."""

_CHUNK = 1 << 22
"""Weights whose ranks are widened to 64 bits at a time: 32 MiB."""


def rank(scores: torch.Tensor) -> torch.Tensor:
    """Returns for each weight of a layer the number of the first of `DENSITIES` at which it is active; uint8, flat."""
    order = scores.reshape(-1).argsort(descending=True, stable=True)
    first = torch.empty(len(order), dtype=torch.uint8)
    ends = [0, *(max(1, round(density * len(order))) for density in DENSITIES)]
    for number, (start, end) in enumerate(itertools.pairwise(ends)):
        first[order[start:end]] = number
    return first


def gradient_costs(
    module: nn.Module,
    weights: Mapping[str, nn.Parameter],
    ranks: Sequence[torch.Tensor],
    inflow: Inflow,
    pictures: torch.Tensor,
    classifier: bool,
    generator: torch.Generator,
    on_picture: Callable[[], None],
) -> npt.NDArray[np.float64]:
    """Returns the cost of each layer at each of `DENSITIES`, as a mean over pictures; shape (layers, densities).

    Args:
        module: the dense network, made `differentiable` in the weights.
        weights: the weights of the sparse layers by name.
        ranks: `rank` of each.
        inflow: means of the layers' inputs. A change of the mean output costs nothing.
        pictures: inputs, shape (pictures, *input_shape).
        classifier: whether the output is logits of classes.
        generator: draws classes and directions.
        on_picture: called after each picture.

    Raises:
        UsageError: the output for a picture contains NaN or inf.
    """
    squares = np.zeros((len(weights), len(DENSITIES)))
    # One picture at a time: the square is of each picture's own gradient, not of their sum.
    for number, picture in enumerate(pictures.split(1)):
        for gradients in _gradients(module, weights, inflow, picture, classifier, generator, number):
            for layer, (weight, gradient) in enumerate(zip(weights.values(), gradients, strict=True)):
                if gradient is not None:  # else the outputs do not depend on this layer
                    # The change of a pruned weight is -w.
                    squares[layer] += pruned_sums(ranks[layer], gradient * weight.detach()) ** 2
        on_picture()
    return squares / (2 * _PROBES * max(len(pictures), 1))


@contextlib.contextmanager
def differentiable(module: nn.Module, names: Sequence[str]) -> Iterator[dict[str, nn.Parameter]]:
    """Gives the named weights alone gradients while it lasts, and returns them by name."""
    parameters = dict(module.named_parameters())
    flags = {parameter: parameter.requires_grad for parameter in parameters.values()}
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    weights = {name: parameters[name] for name in names}
    for weight in weights.values():
        weight.requires_grad_()
    try:
        yield weights
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def _gradients(
    module: nn.Module,
    weights: Mapping[str, nn.Parameter],
    inflow: Inflow,
    picture: torch.Tensor,
    classifier: bool,
    generator: torch.Generator,
    number: int,
) -> Iterator[list[torch.Tensor | None]]:
    """Yields for each probe the gradient by each weight, without the part that acts through the mean output."""
    with inflow.shifts() as shifts:
        # Only here: a generator that is paused inside would leave gradients on for its caller.
        with torch.enable_grad():
            output = module(picture)
            leaves = float_tensors(output)
            if not all(leaf.isfinite().all() for leaf in leaves):
                raise UsageError(
                    f"the output for picture {number + 1} contains NaN or inf; check the weights, and how pictures are "
                    f"normalised."
                )
            probes = [(_class_probe if classifier else _value_probe)(leaves, generator) for _ in range(_PROBES)]
        inputs = [*weights.values(), *shifts.values()]
        for left, probe in zip(reversed(range(_PROBES)), probes, strict=True):
            if not probe.requires_grad:
                return
            found = torch.autograd.grad(probe, inputs, allow_unused=True, retain_graph=left > 0)
            by_shift = dict(zip(shifts, found[len(weights) :], strict=True))
            yield [
                None if gradient is None else gradient - inflow.by_mean(name, by_shift.get(name))
                for name, gradient in zip(weights, found, strict=False)
            ]


def _class_probe(leaves: Sequence[torch.Tensor], generator: torch.Generator) -> torch.Tensor:
    """Returns log p of a class that is drawn from the output's own distribution."""
    log_p = leaves[0].log_softmax(1)
    drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
    return log_p.gather(1, drawn).sum()


def _value_probe(leaves: Sequence[torch.Tensor], generator: torch.Generator) -> torch.Tensor:
    """Returns a random combination of all outputs. A change's mean square in it is twice its relative squared error."""
    total = torch.zeros(())
    for leaf in leaves:
        norm = leaf.detach().square().sum().sqrt()
        if leaf.requires_grad and norm > 0:
            signs = torch.randint(0, 2, leaf.shape, generator=generator) * 2 - 1
            total = total + 2**0.5 * (leaf * signs).sum() / norm
    return total


def pruned_sums(ranks: torch.Tensor, values: torch.Tensor) -> npt.NDArray[np.float64]:
    """Returns the sum of a value of each weight over the weights that are pruned at each of `DENSITIES`."""
    sums = torch.zeros(len(DENSITIES), dtype=torch.float64)
    for part, first in zip(values.reshape(-1).split(_CHUNK), ranks.split(_CHUNK), strict=True):
        sums.index_add_(0, first.long(), part.double())
    # At density k, the weights of all later ranks are pruned.
    return np.asarray(sums.sum() - sums.cumsum(0))
