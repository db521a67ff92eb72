"""Measures what pruning each layer does to the network's outputs, as one cost curve per layer.

The change of the outputs is, to second order, the square of a gradient along the change of the weights: for a
classifier KL(dense || pruned) = 1/2 E[(g . dW)^2] with g the gradient of log p(class) for classes that are drawn from
the dense network's own output (the Fisher matrix; Hassibi & Stork 1992 use its inverse). One backward pass of a picture
therefore gives the costs of all layers at all densities, and no layer has to be pruned for it.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from dsr_tool.calibrate.allocation import Curve, Curves
from dsr_tool.calibrate.inflow import Inflow
from dsr_tool.errors import UsageError
from dsr_tool.sparsity.layers import LayerSpec

__all__ = ["DENSITIES", "is_classifier", "measure"]

DENSITIES: tuple[float, ...] = tuple(np.geomspace(0.01, 1.0, 32).round(5).tolist())
"""Densities at which a layer's cost is known. Neighbours differ by 16 %, less than the noise of the costs."""

_PICTURES = 64
"""Most pictures that are used. Curves of 48 and 96 spread the weights of MobileNetV2 alike within a few percent."""

_PROBES = 2
"""Backward passes of each picture. A forward pass is shared by them, and the draws of one picture differ."""

_CHUNK = 1 << 22
"""Weights whose bins are widened to 64 bits at a time: 32 MiB."""


@torch.no_grad()
def measure(
    module: nn.Module,
    specs: Mapping[str, LayerSpec],
    pictures: torch.Tensor,
    *,
    classifier: bool | None = None,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Curves:
    """Returns the cost of every density of each sparse layer: the change of the outputs when it alone is pruned.

    Weights are ranked by |w| times the root mean square of their input, and what a pruned layer's outputs lose in the
    mean is given back, as norms or biases do after a conversion. The cost is KL(dense || pruned) in nats for a
    classifier, else the squared error of all output tensors relative to their squares. A layer that the outputs do not
    depend on costs 0 everywhere, so it gets its floor.

    Args:
        module: the dense network, in any mode; it stays as it is, gradients and flags included.
        specs: one spec per state_dict entry.
        pictures: inputs, shape (pictures, *input_shape); the first 64 are used.
        classifier: whether the outputs are logits of classes; default: `is_classifier` of the output.
        seed: seed of the drawn classes and directions.
        on_progress: receives the number of finished pictures, and of all.

    Raises:
        UsageError: the outputs or a gradient contain NaN or inf, or do not depend on any sparse layer.
    """
    sparse = [spec for spec in specs.values() if spec.role == "sparse"]
    pictures = pictures[:_PICTURES]
    generator = torch.Generator().manual_seed(seed)
    squares = np.zeros((len(sparse), len(DENSITIES)))
    with _ready(module, [spec.name for spec in sparse]) as weights:
        inflow = Inflow.of(module, weights, pictures)
        bins = [_bins(inflow.scores(name, weight)) for name, weight in weights.items()]
        for number, picture in enumerate(pictures.split(1)):
            for gradients in _gradients(module, weights, inflow, picture, classifier, generator, number):
                for layer, (weight, gradient) in enumerate(zip(weights.values(), gradients, strict=True)):
                    squares[layer] += _products(bins[layer], gradient, weight) ** 2
            if on_progress is not None:
                on_progress(number + 1, len(pictures))
    costs = squares / (2 * _PROBES * max(len(pictures), 1))
    if not costs.any():
        raise UsageError(
            "the outputs do not depend on any sparse layer in a way that has a gradient; use another distribution."
        )
    return Curves({spec.name: Curve.of(spec, DENSITIES, row.tolist()) for spec, row in zip(sparse, costs, strict=True)})


def is_classifier(output: object) -> bool:
    """Returns whether an output looks like logits of classes: one tensor, shape (pictures, classes), classes > 1."""
    return isinstance(output, torch.Tensor) and output.dim() == 2 and output.shape[1] > 1


@contextlib.contextmanager
def _ready(module: nn.Module, names: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Puts a module into eval mode with gradients for the named weights alone, and gives every flag back."""
    training = {child: child.training for child in module.modules()}
    parameters = dict(module.named_parameters())
    flags = {parameter: parameter.requires_grad for parameter in parameters.values()}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the fused attention of eval mode has no gradients
    module.eval()
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in names)
    try:
        yield {name: parameters[name] for name in names}
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        for child, mode in training.items():
            child.training = mode


def _gradients(
    module: nn.Module,
    weights: Mapping[str, torch.Tensor],
    inflow: Inflow,
    picture: torch.Tensor,
    classifier: bool | None,
    generator: torch.Generator,
    number: int,
) -> Iterator[list[torch.Tensor | None]]:
    """Yields for each probe the gradient by each weight, without what a change of the mean output contributes."""
    with inflow.shifts() as shifts:
        # Only here: a generator that is paused inside would leave gradients on for its caller.
        with torch.enable_grad():
            output = module(picture)
            _check(output, f"the output for picture {number + 1}")
            told = is_classifier(output) if classifier is None else classifier
            probes = [(_class_probe if told else _value_probe)(output, generator) for _ in range(_PROBES)]
        inputs = [*weights.values(), *shifts.values()]
        for left, probe in zip(reversed(range(_PROBES)), probes, strict=True):
            if probe is None or not probe.requires_grad:
                return
            found = torch.autograd.grad(probe, inputs, allow_unused=True, retain_graph=left > 0)
            by_shift = dict(zip(shifts, found[len(weights) :], strict=True))
            yield [
                None if gradient is None else gradient - inflow.by_mean(name, by_shift.get(name))
                for name, gradient in zip(weights, found, strict=False)
            ]


def _check(output: object, subject: str) -> None:
    """Raises `UsageError` if an output contains NaN or inf."""
    for leaf in tree_leaves(output):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and not leaf.isfinite().all():
            raise UsageError(f"{subject} contains NaN or inf; check the weights, and how pictures are normalised.")


def _class_probe(output: object, generator: torch.Generator) -> torch.Tensor:
    """Returns log p of a class that is drawn from the output's own distribution."""
    logits = next(leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point())
    log_p = logits.log_softmax(1)
    drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator)
    return log_p.gather(1, drawn.to(log_p.device)).sum()


def _value_probe(output: object, generator: torch.Generator) -> torch.Tensor | None:
    """Returns a random combination of all outputs. A change's mean square in it is twice its relative squared error."""
    total: torch.Tensor | None = None
    for leaf in tree_leaves(output):
        if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point() or not leaf.requires_grad:
            continue
        norm = leaf.detach().square().sum().sqrt()
        if norm > 0:
            signs = torch.randint(0, 2, leaf.shape, generator=generator).to(leaf) * 2 - 1
            part = 2**0.5 * (leaf * signs).sum() / norm
            total = part if total is None else total + part
    return total


def _bins(scores: torch.Tensor) -> torch.Tensor:
    """Returns for each weight of a layer the number of the first of `DENSITIES` at which it is active; uint8, flat."""
    order = scores.reshape(-1).argsort(descending=True, stable=True)
    first = torch.empty(len(order), dtype=torch.uint8)
    ends = [0, *(max(1, round(density * len(order))) for density in DENSITIES)]
    for number, (start, end) in enumerate(itertools.pairwise(ends)):
        first[order[start:end]] = number
    return first


def _products(bins: torch.Tensor, gradient: torch.Tensor | None, weight: torch.Tensor) -> npt.NDArray[np.float64]:
    """Returns gradient times change of the weights at each density: minus the sum over the pruned weights of g w."""
    if gradient is None:  # the outputs do not depend on this layer
        return np.zeros(len(DENSITIES))
    values = (gradient * weight.detach()).reshape(-1)
    sums = torch.zeros(len(DENSITIES), dtype=torch.float64)
    for part, first in zip(values.split(_CHUNK), bins.split(_CHUNK), strict=True):
        sums.index_add_(0, first.long(), part.double())
    # At density k, the weights of all later bins are pruned.
    return np.asarray(sums.sum() - sums.cumsum(0))
