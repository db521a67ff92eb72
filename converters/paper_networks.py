"""The networks that papers on sparse training use, as modules.

LeNet-300-100 as Mostafa & Wang (ICML 2019) trained it on MNIST, and wide residual networks (Zagoruyko & Komodakis, BMVC
2016) as they and Evci et al. (ICML 2020) trained them on CIFAR-10.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from dsr_tool.errors import UsageError

__all__ = ["Perceptron", "WideBlock", "WideResNet"]

_STEM = 16
"""Channels of the first convolution, whatever the widen factor."""


class Perceptron(nn.Sequential):
    """Linear layers, each followed by batch normalisation instead of a bias, the last one too.

    Weights start as torch's own, uniform in +-1/sqrt(fan-in), as in the authors' code.
    """

    def __init__(self, inputs: int, hidden: Sequence[int], num_classes: int) -> None:
        """Makes the network.

        Args:
            inputs: number of values of one input, which may have any shape.
            hidden: number of outputs of each hidden layer.
            num_classes: number of outputs of the last layer.
        """
        layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        sizes = [inputs, *hidden, num_classes]
        for i, (fan_in, fan_out) in enumerate(pairwise(sizes), start=1):
            # No bias: the normalisation that follows would subtract it again.
            layers[f"fc{i}"] = nn.Linear(fan_in, fan_out, bias=False)
            layers[f"bn{i}"] = nn.BatchNorm1d(fan_out)
            if i <= len(hidden):
                layers[f"relu{i}"] = nn.ReLU(inplace=True)
        super().__init__(layers)


class WideBlock(nn.Module):
    """Two 3x3 convolutions, each after its normalisation and ReLU, and a shortcut around them.

    If the shape changes, the shortcut is a 1x1 convolution of the normalised input, otherwise the input itself.

    Attributes:
        shortcut: the 1x1 convolution, or None.
    """

    def __init__(self, channels: int, filters: int, stride: int) -> None:
        """Makes a block from `channels` to `filters` channels that divides height and width by `stride`."""
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, filters, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(filters)
        self.conv2 = nn.Conv2d(filters, filters, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        # The shortcut reads the normalised input, not x, as in the code of the paper's authors.
        changes = stride != 1 or channels != filters
        self.shortcut = nn.Conv2d(channels, filters, 1, stride, bias=False) if changes else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (batch, channels, height, width) to (batch, filters, height / stride, width / stride)."""
        normalised = self.relu(self.bn1(x))
        skipped = x if self.shortcut is None else self.shortcut(normalised)
        added: torch.Tensor = skipped + self.conv2(self.relu(self.bn2(self.conv1(normalised))))
        return added


class WideResNet(nn.Module):
    """Pre-activation residual network of three groups, with `widen` times the channels of a plain one.

    Convolutions start as in He et al. (ICCV 2015), scaled by the number of outputs; there is no dropout.

    Attributes:
        conv1: the first convolution.
        groups: the residual blocks; the second and third group halve height and width.
        fc: the linear classifier.
    """

    def __init__(self, depth: int, widen: float, num_classes: int = 10, channels: int = 3) -> None:
        """Makes the network.

        Args:
            depth: number of convolutions on the longest path, plus the classifier; 6 n + 4 for n blocks per group.
            widen: factor on the 16, 32 and 64 filters of the groups; any positive number.
            num_classes: number of outputs.
            channels: number of channels of the input.

        Raises:
            UsageError: the depth is not 6 n + 4.
        """
        super().__init__()
        # Three groups of n blocks have 6 n convolutions; the paper counts four more layers.
        blocks, odd = divmod(depth - 4, 6)
        if blocks < 1 or odd:
            raise UsageError(f"depth {depth} is not allowed; give 6 n + 4 for n blocks per group, such as 22 or 28.")
        filters = [max(1, round(16 * factor * widen)) for factor in (1, 2, 4)]
        self.conv1 = nn.Conv2d(channels, _STEM, 3, padding=1, bias=False)
        self.groups = nn.Sequential(
            *(
                nn.Sequential(WideBlock(before, now, stride), *(WideBlock(now, now, 1) for _ in range(blocks - 1)))
                for before, now, stride in zip([_STEM, *filters], filters, (1, 2, 2), strict=False)
            )
        )
        self.bn = nn.BatchNorm2d(filters[-1])
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(filters[-1], num_classes)
        self._initialise()

    def _initialise(self) -> None:
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (batch, channels, height, width) to (batch, classes)."""
        features = self.relu(self.bn(self.groups(self.conv1(x))))
        logits: torch.Tensor = self.fc(self.pool(features).flatten(1))
        return logits
