"""Measures what pruning each layer does to the network's outputs, as one cost curve per layer.

A curve is the squared error of the layer's own outputs, times a power of the density that brings it closest to the
costs by `gradients`: these know what the outputs are worth to the network, but are noisy. Then two points of each
curve are measured by pruning the layer for real (`trials`), which scales it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from dsr_tool.calibrate.allocation import Curve, Curves
from dsr_tool.calibrate.gradients import DENSITIES, PASSES, differentiable, gradient_costs, pruned_sums, rank
from dsr_tool.calibrate.inflow import Inflow
from dsr_tool.calibrate.trials import is_classifier, prune_each
from dsr_tool.errors import UsageError
from dsr_tool.sparse.feeding import evaluating
from dsr_tool.sparsity.layers import LayerSpec

__all__ = ["measure"]

_PICTURES, _LEAST_PICTURES, _GRADIENT_MACS = 64, 8, 1e12
"""Most pictures for gradients, fewest, and multiply-adds of one pass over them.

All 64 are used up to 16 GMACs a picture, as VGG-16 has. With very few, linear layers would seem to read constants.
"""

_TRIAL_PICTURES, _LEAST_TRIAL_PICTURES, _TRIAL_MACS = 32, 4, 4e12
"""Most pictures for trials, fewest, and multiply-adds of one pass over them for every layer: 18 for ResNet-50.

Where that leaves fewer than four, as for the larger EfficientNets, the gradients stand alone.
"""

_TRIALS = (0.1, 0.3)
"""Densities of the network for which each layer is tried at the density that its curve leads to."""

_SPARSEST, _NEARLY_DENSE = 0.02, 0.9
"""Densities of a layer between which costs are fitted and tried. Above, trials would show little but noise."""

_MOST = 20.0
"""Largest factor by which a trial corrects a gradient. On MobileNetV2 they were between 1/9 and 13."""


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
        module: the dense network on the CPU, in any mode; it stays as it is, gradients and flags included.
        specs: one spec per state_dict entry.
        pictures: inputs, shape (pictures, *input_shape); the first 64 are used, fewer for networks that are slow.
        classifier: whether the output is logits of classes; default: whether it is one matrix (`is_classifier`).
        seed: seed of the drawn classes and directions.
        on_progress: receives the work that is done, and all of it, in forward passes.

    Raises:
        UsageError: an output or a cost is NaN or infinite, or the outputs do not depend on any sparse layer.
    """
    sparse = [spec for spec in specs.values() if spec.role == "sparse"]
    macs = sum(spec.macs_per_weight * spec.size for spec in specs.values())
    pictures = pictures[: max(_affordable(_PICTURES, _GRADIENT_MACS, macs), _LEAST_PICTURES)]
    few = pictures[: _affordable(_TRIAL_PICTURES, _TRIAL_MACS, macs * len(sparse))]
    # A trial starts at its layer, so it takes half a pass on average.
    clock = _Clock(len(pictures) * PASSES + len(sparse) * len(_TRIALS) * len(few) // 2, on_progress)
    with evaluating(module), differentiable(module, [spec.name for spec in sparse]) as weights:
        told = is_classifier(module(pictures[:1])) if classifier is None else classifier
        inflow = Inflow.of(module, weights, pictures)
        ranks = [rank(inflow.scores(name, weight)) for name, weight in weights.items()]
        generator = torch.Generator().manual_seed(seed)
        noisy = gradient_costs(module, weights, ranks, inflow, pictures, told, generator, lambda: clock.advance(PASSES))
        errors = [pruned_sums(first, inflow.errors(*item)) for first, item in zip(ranks, weights.items(), strict=True)]
    costs = np.array([_smooth(row, error) for row, error in zip(noisy, errors, strict=True)])
    if not costs.any():
        raise UsageError(
            f"the outputs of {type(module).__name__} have no gradient by any sparse layer; give another distribution."
        )
    if len(few) >= min(_LEAST_TRIAL_PICTURES, len(pictures)):
        levels = _levels(sparse, costs)
        masks = {
            spec.name: [(first <= level).reshape(spec.shape) for level in chosen]
            for spec, first, chosen in zip(sparse, ranks, levels, strict=True)
        }
        found = prune_each(module, masks, few, told, lambda: clock.advance(len(few) // 2))
        tried = zip(costs, levels, found.values(), strict=True)
        costs = np.array([_through(*row) for row in tried])
    clock.finish()
    return _curves(sparse, costs)


def _affordable(most: int, limit: float, macs: float) -> int:
    """Returns the number of pictures that a limit of multiply-adds allows, at most `most`."""
    return min(most, int(limit / max(macs, 1.0)))


def _curves(sparse: Sequence[LayerSpec], costs: npt.NDArray[np.float64]) -> Curves:
    return Curves({spec.name: Curve.of(spec, DENSITIES, row.tolist()) for spec, row in zip(sparse, costs, strict=True)})


def _smooth(noisy: npt.NDArray[np.float64], errors: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Returns errors times the power of the density that is closest to noisy costs, by logarithms.

    Without this, single low points would be corners of the convex curve, and many totals would lead to them.
    """
    fitted = (noisy > 0) & (errors > 0) & (np.array(DENSITIES) > _SPARSEST) & (np.array(DENSITIES) < _NEARLY_DENSE)
    if fitted.sum() < 2:
        return noisy
    logs = np.log(DENSITIES)
    power, constant = np.polyfit(logs[fitted], np.log(noisy[fitted] / errors[fitted]), 1)
    return errors * np.exp(float(constant) + float(power) * logs)


def _levels(sparse: Sequence[LayerSpec], costs: npt.NDArray[np.float64]) -> list[list[int]]:
    """Returns the numbers of the densities at which each layer is tried: where its curve leads at `_TRIALS`."""
    curves, size = _curves(sparse, costs), sum(spec.size for spec in sparse)
    levels: list[list[int]] = [[] for _ in sparse]
    for density in _TRIALS:
        counts = curves.spread(max(round(density * size), len(sparse)))
        for spec, chosen, count in zip(sparse, levels, counts, strict=True):
            level = int(np.searchsorted(DENSITIES, count / spec.size))
            if DENSITIES[level] < _NEARLY_DENSE and level not in chosen:
                chosen.append(level)
    return levels


def _through(
    costs: npt.NDArray[np.float64], levels: Sequence[int], found: Sequence[float | None]
) -> npt.NDArray[np.float64]:
    """Returns a curve through its trials: costs times a factor that is a power of the density between them."""
    tried = sorted((level, cost) for level, cost in zip(levels, found, strict=True) if cost is not None)
    tried = [(level, cost) for level, cost in tried if costs[level] > 0]
    if not tried:
        return costs
    logs = np.log(DENSITIES)
    factors = [np.clip(cost / costs[level], 1 / _MOST, _MOST) for level, cost in tried]
    return costs * np.exp(np.interp(logs, [logs[level] for level, _ in tried], np.log(factors)))


class _Clock:
    """Counts forward passes and tells them."""

    def __init__(self, total: int, on_progress: Callable[[int, int], None] | None) -> None:
        self._done, self._total, self._tell = 0, total, on_progress

    def advance(self, passes: int) -> None:
        """Adds passes, up to one less than all: fewer trials than expected may be needed."""
        self._done = min(self._done + passes, self._total)
        if self._tell is not None:
            self._tell(self._done, self._total)

    def finish(self) -> None:
        """Tells that all is done."""
        self.advance(self._total)
