"""Architectures of torchvision that can be built narrower, through their public constructors."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torchvision import models
from torchvision.models.resnet import Bottleneck

__all__ = ["WIDTHS"]


def _mobilenet(name: str) -> Callable[[float, int], nn.Module]:
    def make(width: float, num_classes: int) -> nn.Module:
        module: nn.Module = models.get_model(name, weights=None, width_mult=width, num_classes=num_classes)
        return module

    return make


def _mnasnet(alpha: float) -> Callable[[float, int], nn.Module]:
    return lambda width, num_classes: models.MNASNet(alpha * width, num_classes)


def _shufflenet(*channels: int) -> Callable[[float, int], nn.Module]:
    def make(width: float, num_classes: int) -> nn.Module:
        # Every stage splits its channels in two halves.
        even = [max(2, 2 * round(number * width / 2)) for number in channels]
        module: nn.Module = models.ShuffleNetV2([4, 8, 4], even, num_classes)
        return module

    return make


def _densenet(growth: int, blocks: tuple[int, ...], first: int) -> Callable[[float, int], nn.Module]:
    return lambda width, num_classes: models.DenseNet(
        max(1, round(growth * width)), blocks, max(2, round(first * width)), num_classes=num_classes
    )


def _bottlenecks(layers: list[int], base: int = 64, groups: int = 1) -> Callable[[float, int], nn.Module]:
    """Returns a maker of residual networks; the width scales the 3x3 convolutions, not the channels between blocks."""
    return lambda width, num_classes: models.ResNet(
        Bottleneck, layers, num_classes, groups=groups, width_per_group=max(1.0, base * width)
    )


WIDTHS: dict[str, Callable[[float, int], nn.Module]] = {
    **{name: _mobilenet(name) for name in ("mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small")},
    "mnasnet0_5": _mnasnet(0.5),
    "mnasnet0_75": _mnasnet(0.75),
    "mnasnet1_0": _mnasnet(1.0),
    "mnasnet1_3": _mnasnet(1.3),
    "shufflenet_v2_x0_5": _shufflenet(24, 48, 96, 192, 1024),
    "shufflenet_v2_x1_0": _shufflenet(24, 116, 232, 464, 1024),
    "shufflenet_v2_x1_5": _shufflenet(24, 176, 352, 704, 1024),
    "shufflenet_v2_x2_0": _shufflenet(24, 244, 488, 976, 2048),
    "densenet121": _densenet(32, (6, 12, 24, 16), 64),
    "densenet161": _densenet(48, (6, 12, 36, 24), 96),
    "densenet169": _densenet(32, (6, 12, 32, 32), 64),
    "densenet201": _densenet(32, (6, 12, 48, 32), 64),
    "resnet50": _bottlenecks([3, 4, 6, 3]),
    "resnet101": _bottlenecks([3, 4, 23, 3]),
    "resnet152": _bottlenecks([3, 8, 36, 3]),
    "resnext50_32x4d": _bottlenecks([3, 4, 6, 3], 4, 32),
    "resnext101_32x8d": _bottlenecks([3, 4, 23, 3], 8, 32),
    "resnext101_64x4d": _bottlenecks([3, 4, 23, 3], 4, 64),
    "wide_resnet50_2": _bottlenecks([3, 4, 6, 3], 128),
    "wide_resnet101_2": _bottlenecks([3, 4, 23, 3], 128),
}
"""Makers by name: from a factor on the architecture's own width, and a number of classes, to the network."""
