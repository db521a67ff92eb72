"""Prunes one layer at a time for real, and compares the outputs with those of the dense network.

Gradients tell what a small change does. Where a pruned layer moves the next activations out of their linear part, they
are wrong by up to ten times in either direction, so single points of the curves are measured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dsr_tool.calibrate.segments import Segments, Values, used
from dsr_tool.sparse.feeding import evaluating, float_tensors

__all__ = ["TRIAL_BATCH", "distance", "is_classifier", "prune_each"]

TRIAL_BATCH = 16
"""Pictures of one pass, and of the means of outputs that it gives back: those of fewer would say too much of each."""


def is_classifier(output: object) -> bool:
    """Returns whether an output looks like logits of classes: one tensor, shape (pictures, classes), classes > 1."""
    return isinstance(output, torch.Tensor) and output.dim() == 2 and output.shape[1] > 1


def distance(output: object, dense: object, classifier: bool) -> float | None:
    """Returns how far an output is from that of the dense network; None if the two cannot be compared.

    It is the mean of KL(dense || output) in nats for a classifier. Otherwise it is the sum over all tensors of the
    squared error relative to the square; tensors of other shapes, such as lists of detected boxes, have none.
    """
    pairs = list(zip(float_tensors(output), float_tensors(dense), strict=False))
    if not pairs or any(ours.shape != theirs.shape for ours, theirs in pairs):
        return None
    if classifier:
        log_q, log_p = (tensor.double().log_softmax(1) for tensor in pairs[0])
        return float((log_p.exp() * (log_p - log_q)).sum(1).mean())
    return sum(float((ours - theirs).square().sum() / theirs.square().sum().clamp_min(1e-30)) for ours, theirs in pairs)


def prune_each(
    module: nn.Module,
    masks: Mapping[str, Sequence[torch.Tensor]],
    pictures: torch.Tensor,
    classifier: bool,
    on_trial: Callable[[], None] = lambda: None,
) -> dict[str, list[float | None]]:
    """Returns the distance of the outputs for each mask of each layer, with all other layers dense.

    What a layer's outputs lose in the mean of each channel is given back, as norms or biases do after a conversion.
    Passes go on from the values before the layer's stage.

    Args:
        module: the dense network; it is left as it was.
        masks: masks to try, by the name of the weight.
        pictures: inputs, shape (pictures, *input_shape).
        classifier: see `distance`.
        on_trial: called after each mask.
    """
    parameters = dict(module.named_parameters())
    with evaluating(module):
        segments = Segments.of(module, pictures[:2])
        # A layer that no stage uses leaves the outputs as they are.
        costs: dict[str, list[float | None]] = {
            name: [] if name in segments.stage_of else [0.0] * len(tried) for name, tried in masks.items()
        }
        values = [segments.begin(batch) for batch in pictures.split(TRIAL_BATCH)]
        dense = [segments.run(used(value)) for value in values]
        for stage in range(len(segments)):
            names = [name for name in masks if segments.stage_of.get(name) == stage]
            owners = {name: module.get_submodule(name.rpartition(".")[0]) for name in names}
            with _means(owners) as means:
                after = [segments.advance(stage, used(value)) for value in values]
            for name in names:
                if len(means[name]) != len(values):  # a layer that is called several times has no single mean
                    means[name].clear()
                for mask in masks[name]:
                    trial = _Trial(parameters[name], mask, owners[name], means[name])
                    costs[name].append(_try(segments, stage, values, dense, trial, classifier))
                    on_trial()
            values = after
    return costs


@dataclass(frozen=True)
class _Trial:
    """One mask of one layer, and the mean outputs of the dense layer by batch; none if they are not known."""

    weight: nn.Parameter
    mask: torch.Tensor
    owner: nn.Module
    means: Sequence[torch.Tensor]


def _try(
    segments: Segments,
    stage: int,
    values: Sequence[Values],
    dense: Sequence[object],
    trial: _Trial,
    classifier: bool,
) -> float | None:
    """Returns the distance of the outputs with one mask, as a mean over all pictures."""
    before = trial.weight.detach().clone()
    trial.weight.mul_(trial.mask)
    total = 0.0
    try:
        for number, value in enumerate(values):
            with _shifted(trial.owner, trial.means[number : number + 1]):
                found = distance(segments.run(used(value), stage), dense[number], classifier)
            if found is None:
                return None
            total += found / len(values)
    finally:
        trial.weight.copy_(before)
    return total


def _mean(owner: nn.Module, output: object) -> torch.Tensor | None:
    """Returns the mean output of each channel, in a shape that broadcasts; None for other modules."""
    if not isinstance(output, torch.Tensor) or not isinstance(owner, (nn.Linear, nn.modules.conv._ConvNd)):
        return None
    channel = output.dim() - 1 if isinstance(owner, nn.Linear) else output.dim() + 1 - owner.weight.dim()
    return output.mean([axis for axis in range(output.dim()) if axis != channel], keepdim=True)


@contextlib.contextmanager
def _means(owners: Mapping[str, nn.Module]) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Collects the mean outputs of layers, one per call."""
    means: dict[str, list[torch.Tensor]] = {name: [] for name in owners}

    def hook(name: str, owner: nn.Module, output: object) -> None:
        mean = _mean(owner, output)
        if mean is not None:
            means[name].append(mean)

    handles = [
        owner.register_forward_hook(lambda owner, _, output, name=name: hook(name, owner, output))
        for name, owner in owners.items()
    ]
    try:
        yield means
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _shifted(owner: nn.Module, means: Sequence[torch.Tensor]) -> Iterator[None]:
    """Shifts the outputs of a layer to a mean of each channel, if there is one."""

    def hook(owner: nn.Module, _: object, output: torch.Tensor) -> torch.Tensor:
        mean = _mean(owner, output)
        return output if mean is None else output + (means[0] - mean)

    handle = owner.register_forward_hook(hook) if means else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
