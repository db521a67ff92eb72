"""Source: the small networks that papers on sparse training measure, by name.

LeNet-300-100 as Mostafa & Wang (ICML 2019) trained it on MNIST, and wide residual networks (Zagoruyko & Komodakis, BMVC
2016) as they and Evci et al. (ICML 2020) trained them on CIFAR-10.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from converters.state_dicts import is_state_file, load_strictly, read_state
from dsr_tool.errors import UsageError
from dsr_tool.sparsity.config import LONGEST_SIDE, ModelConfig, Preprocessing

__all__ = ["MODELS", "PaperModel", "Perceptron", "WideBlock", "WideResNet", "build", "load", "structure"]

_STEM = 16  # channels of the first convolution, whatever the widen factor


class Perceptron(nn.Sequential):
    """Linear layers, each followed by batch normalisation in the place of its bias, the last one too.

    Weights start as torch's own, uniform in +-1/sqrt(fan-in), which is what the authors' code does.
    """

    def __init__(self, inputs: int, hidden: Sequence[int], num_classes: int) -> None:
        """Make it.

        Args:
            inputs: values of one input, which may have any shape.
            hidden: outputs of each hidden layer.
            num_classes: outputs of the last.
        """
        layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        sizes = [inputs, *hidden, num_classes]
        for i, (fan_in, fan_out) in enumerate(pairwise(sizes), start=1):
            layers[f"fc{i}"] = nn.Linear(fan_in, fan_out, bias=False)
            layers[f"bn{i}"] = nn.BatchNorm1d(fan_out)
            if i <= len(hidden):
                layers[f"relu{i}"] = nn.ReLU(inplace=True)
        super().__init__(layers)


class WideBlock(nn.Module):
    """Two 3x3 convolutions, each behind its normalisation and ReLU, and a shortcut around them.

    Where the shape changes, the shortcut is a 1x1 convolution of the normalised input, otherwise the input itself.

    Attributes:
        shortcut: that convolution, or None.
    """

    def __init__(self, channels: int, filters: int, stride: int) -> None:
        """Make it: `channels` in, `filters` out, smaller by `stride`."""
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, filters, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(filters)
        self.conv2 = nn.Conv2d(filters, filters, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        changes = stride != 1 or channels != filters
        self.shortcut = nn.Conv2d(channels, filters, 1, stride, bias=False) if changes else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """From (batch, channels, height, width) to (batch, filters, height / stride, width / stride)."""
        normalised = self.relu(self.bn1(x))
        kept = x if self.shortcut is None else self.shortcut(normalised)
        added: torch.Tensor = kept + self.conv2(self.relu(self.bn2(self.conv1(normalised))))
        return added


class WideResNet(nn.Module):
    """Pre-activation residual network of three groups, whose convolutions are `widen` times as wide as a plain one's.

    Convolutions start as in He et al. (ICCV 2015), by the number of outputs; there is no dropout.

    Attributes:
        conv1: first convolution.
        groups: the blocks; the second and third group halve height and width.
        fc: the linear classifier.
    """

    def __init__(self, depth: int, widen: float, num_classes: int = 10, channels: int = 3) -> None:
        """Make it.

        Args:
            depth: convolutions on the longest way and the classifier; 6 n + 4 for n blocks per group.
            widen: factor on the 16, 32 and 64 filters of the groups; any positive number.
            num_classes: outputs.
            channels: of the input.

        Raises:
            UsageError: no such depth.
        """
        super().__init__()
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
        """From (batch, channels, height, width) to (batch, classes)."""
        features = self.relu(self.bn(self.groups(self.conv1(x))))
        logits: torch.Tensor = self.fc(self.pool(features).flatten(1))
        return logits


@dataclass(frozen=True)
class PaperModel:
    """What stands behind a name.

    Attributes:
        input_shape: channels, height and width of the images that it was published for.
        make: from input shape, number of classes and width, relative to its own, to the network.
    """

    input_shape: tuple[int, int, int]
    make: Callable[[tuple[int, ...], int, float], nn.Module]


def _lenet(shape: tuple[int, ...], num_classes: int, width: float) -> nn.Module:
    inputs = math.prod(shape)
    if inputs > LONGEST_SIDE:
        raise UsageError(
            f"--input-shape {list(shape)} has {inputs:,} values, which a layer of linear weights cannot take; give at "
            f"most {LONGEST_SIDE:,}."
        )
    return Perceptron(inputs, [max(1, round(n * width)) for n in (300, 100)], num_classes)


def _wide(depth: int, widen: float) -> PaperModel:
    return PaperModel((3, 32, 32), lambda shape, classes, width: WideResNet(depth, widen * width, classes, shape[0]))


MODELS: dict[str, PaperModel] = {
    "lenet-300-100": PaperModel((1, 28, 28), _lenet),
    "wrn-22-2": _wide(22, 2),
    "wrn-28-2": _wide(28, 2),
}
"""The networks by name; they were published for ten classes."""


def build(name: str, num_classes: int = 10, input_shape: Sequence[int] = (), width: float = 1.0) -> nn.Module:
    """A randomly initialised network.

    Args:
        name: one of `MODELS`.
        num_classes: outputs.
        input_shape: channels, height and width; those that it was published for when absent.
        width: factor on the channels, or hidden units, of all layers but the first convolution and the last layer.
    """
    return MODELS[name].make(tuple(input_shape) or MODELS[name].input_shape, num_classes, width)


def structure(config: ModelConfig) -> nn.Module:
    """The network that a description is of, without values, on the meta device."""
    with torch.device("meta"):
        return build(config.architecture, config.num_classes, config.input_shape, config.width)


def load(
    name: str,
    weights: str | None = None,
    *,
    num_classes: int | None = None,
    input_size: int | None = None,
    input_shape: Sequence[int] = (),
    width: float = 1.0,
    seed: int = 0,
) -> tuple[nn.Module, ModelConfig]:
    """Build a network, fill in its weights, and describe it.

    Args:
        name: one of `MODELS`.
        weights: a state_dict file of exactly this network; random weights when absent.
        num_classes: outputs; 10 when absent.
        input_size: side of the square input in pixels.
        input_shape: instead, channels, height and width of one input.
        width: see `build`.
        seed: of random weights.

    Raises:
        UsageError: an input of other than three dimensions, or weights that are no file of this network's.
        FileError: there is no such file.
        FormatError: it cannot be read.
    """
    own = MODELS[name].input_shape
    shape = tuple(input_shape) or (own if input_size is None else (own[0], input_size, input_size))
    if len(shape) != 3:
        raise UsageError(f"--input-shape {list(shape)} does not fit {name}; give channels, height and width.")
    if weights is not None and not is_state_file(weights):
        raise UsageError(f"--weights {weights!r} is no file, and {name} has no published weights; leave it out.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build(name, num_classes or 10, shape, width)
    if weights is not None:
        load_strictly(module, name, read_state(Path(weights)), weights)
    config = ModelConfig(
        source="paper",
        architecture=name,
        num_classes=num_classes or 10,
        input_shape=shape,
        preprocessing=_preprocessing(shape),
        conversion={"weights": weights},
        width=width,
    )
    return module, config


def _preprocessing(shape: tuple[int, ...]) -> Preprocessing:
    """Whole pictures in [-1, 1], until a training puts its data's statistics in the place of this."""
    side = shape[1] if shape[1] == shape[2] else 0
    half = (0.5,) * shape[0]
    return Preprocessing(side, side, half, half)
