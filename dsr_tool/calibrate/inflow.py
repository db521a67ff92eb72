"""Inflow: means of what each layer reads, by which weights are ranked and changes of the mean output are told apart.

A pruned layer's outputs lose their mean, which the norm or bias after it takes back at no cost; only what varies from
place to place is lost. Means are by channel: taps at a border, which see padding, count as the others do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from dsr_tool.calibrate.memory import BATCH

__all__ = ["Inflow"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


@dataclass(frozen=True)
class Inflow:
    """Means of the inputs of the layers whose module is called; attention's projections, say, are not.

    Attributes:
        layers: module of each weight, by the weight's name.
        means: mean of each input channel, by weight name, shape (channels,).
        squares: mean square of each input channel.
    """

    layers: Mapping[str, nn.Module]
    means: Mapping[str, torch.Tensor]
    squares: Mapping[str, torch.Tensor]

    @classmethod
    def of(cls, module: nn.Module, names: Mapping[str, torch.Tensor], pictures: torch.Tensor) -> Inflow:
        """Runs the pictures through a module in eval mode and averages the inputs of its layers."""
        layers = {
            name: owner
            for name in names
            if isinstance(owner := module.get_submodule(name.rpartition(".")[0]), (nn.Linear, *_CONVOLUTIONS))
        }
        sums = {name: torch.zeros(3, _channels(owner)) for name, owner in layers.items()}
        hooks = [owner.register_forward_pre_hook(_adder(sums[name])) for name, owner in layers.items()]
        try:
            for batch in pictures.split(BATCH):
                module(batch)
        finally:
            for hook in hooks:
                hook.remove()
        # A module that is never called has no mean.
        seen = {name: sums[name] for name in layers if sums[name][2].any()}
        return cls(
            {name: layers[name] for name in seen},
            {name: total / count for name, (total, _, count) in seen.items()},
            {name: square / count for name, (_, square, count) in seen.items()},
        )

    def scores(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Returns what ranks the weights of a layer: |w| times the root mean square of the input.

        This is the score of Wanda (Sun et al., ICLR 2024); |w| alone where the inputs are not known.
        """
        if name not in self.squares:
            return weight.abs()
        return weight.abs() * self._of_inputs(name, self.squares[name].sqrt(), weight)

    def errors(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Returns the squared error of the layer's outputs when one weight is pruned and their mean is given back.

        It is w^2 times the variance of the input; w^2 alone where the inputs are not known.
        """
        if name not in self.squares:
            return weight.square()
        variance = (self.squares[name] - self.means[name].square()).clamp_min(0.0)
        return weight.square() * self._of_inputs(name, variance, weight)

    def by_mean(self, name: str, by_shift: torch.Tensor | None) -> torch.Tensor | float:
        """Returns the part of a weight's gradient that acts through the layer's mean output.

        Args:
            name: name of the weight.
            by_shift: gradient by a shift of the layer's outputs, shape (outputs,).
        """
        if by_shift is None:
            return 0.0
        owner = self.layers[name]
        weight = owner.get_parameter("weight")
        if isinstance(owner, _TRANSPOSED):
            outputs = by_shift.reshape(owner.groups, 1, -1).expand(-1, weight.shape[0] // owner.groups, -1)
            outputs = outputs.reshape(weight.shape[:2])
        else:
            outputs = by_shift[:, None]
        outputs = outputs.reshape(*outputs.shape, *[1] * (weight.dim() - 2))
        return outputs * self._of_inputs(name, self.means[name], weight)

    def _of_inputs(self, name: str, values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Returns a value of each input channel at the weights that read it, in a shape that fits the weight."""
        owner = self.layers[name]
        if isinstance(owner, nn.Linear):
            return values[None, :]
        taps = [1] * (weight.dim() - 2)
        if isinstance(owner, _TRANSPOSED):
            return values.reshape(-1, 1, *taps)
        assert isinstance(owner, _CONVOLUTIONS)  # noqa: S101 - for the type checker
        by_group = values.reshape(owner.groups, 1, -1).expand(-1, weight.shape[0] // owner.groups, -1)
        return by_group.reshape(weight.shape[0], -1, *taps)

    @contextlib.contextmanager
    def shifts(self) -> Iterator[dict[str, torch.Tensor]]:
        """Adds a shift of 0 to the outputs of every layer, by channel, so that it gets a gradient."""
        shifts = {name: torch.zeros(_channels(owner, 1), requires_grad=True) for name, owner in self.layers.items()}

        def hook(name: str, owner: nn.Module, output: torch.Tensor) -> torch.Tensor:
            taps = 0 if isinstance(owner, nn.Linear) else owner.get_parameter("weight").dim() - 2
            return output + shifts[name].reshape(-1, *[1] * taps)

        hooks = [
            owner.register_forward_hook(lambda owner, _, output, name=name: hook(name, owner, output))
            for name, owner in self.layers.items()
        ]
        try:
            yield shifts
        finally:
            for handle in hooks:
                handle.remove()


def _channels(owner: nn.Module, side: int = 0) -> int:
    """Returns the input channels of a layer, or with `side` 1 its output channels."""
    if isinstance(owner, nn.Linear):
        return (owner.in_features, owner.out_features)[side]
    assert isinstance(owner, _CONVOLUTIONS)  # noqa: S101 - for the type checker
    return (owner.in_channels, owner.out_channels)[side]


def _adder(sums: torch.Tensor) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
    """Returns a hook that adds sum, sum of squares and number of the inputs, by channel, to the rows of `sums`."""

    def add(owner: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        x = arguments[0]
        if isinstance(owner, _CONVOLUTIONS):
            x = x.movedim(1 - owner.get_parameter("weight").dim(), -1)
        rows = x.reshape(-1, x.shape[-1]).float()
        sums[0] += rows.sum(0)
        sums[1] += rows.square().sum(0)
        sums[2] += len(rows)

    return add
