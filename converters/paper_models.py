"""Source: the small networks that papers on sparse training use, by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from converters.base import Source
from converters.paper_networks import Perceptron, WideBlock, WideResNet
from converters.state_dicts import fill_from_file, is_state_file
from dsr_tool.errors import UsageError
from dsr_tool.sparsity.config import LONGEST_SIDE, ModelConfig, Preprocessing

__all__ = ["MODELS", "SOURCE", "PaperModel", "build", "load", "structure"]

_CLASSES = 10
"""Number of classes that the networks were published for."""


@dataclass(frozen=True)
class PaperModel:
    """A network of a paper.

    Attributes:
        input_shape: channels, height and width of the images that it was published for.
        make: builds the network from input shape, number of classes and width relative to its own.
    """

    input_shape: tuple[int, int, int]
    make: Callable[[tuple[int, ...], int, float], nn.Module]


def _lenet(shape: tuple[int, ...], num_classes: int, width: float) -> nn.Module:
    inputs = math.prod(shape)
    # --input-shape bounds each side, not their product, and a first layer of this many inputs would fill the memory.
    if inputs > LONGEST_SIDE:
        raise UsageError(
            f"--input-shape {list(shape)} has {inputs:,} values, which are too many for a linear layer; give at "
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
"""The networks by name."""


def build(name: str, num_classes: int = _CLASSES, input_shape: Sequence[int] = (), width: float = 1.0) -> nn.Module:
    """Returns a randomly initialised network.

    Args:
        name: a name in `MODELS`.
        num_classes: number of outputs.
        input_shape: channels, height and width; those that it was published for when absent.
        width: factor on the channels, or hidden units, of all layers but the first convolution and the last layer.
    """
    return MODELS[name].make(tuple(input_shape) or MODELS[name].input_shape, num_classes, width)


def structure(config: ModelConfig) -> nn.Module:
    """Returns the network of a description without values, on the meta device.

    Raises:
        UsageError: there is no network of that name.
    """
    if config.architecture not in MODELS:
        raise UsageError(
            f"dsr-tool cannot build architecture {config.architecture!r}; give load() a module of that class."
        )
    with torch.device("meta"):
        return build(config.architecture, config.num_classes, config.input_shape, config.width)


def load(
    name: str,
    weights: str | None = None,
    *,
    num_classes: int | None = None,
    input_size: int | None = None,
    input_shape: tuple[int, ...] = (),
    width: float = 1.0,
    seed: int = 0,
) -> tuple[nn.Module, ModelConfig]:
    """Builds a network, fills in its weights, and describes it.

    Args:
        name: a name in `MODELS`.
        weights: a state_dict file of exactly this network; random weights when absent.
        num_classes: number of outputs; 10 when absent.
        input_size: side of the square input in pixels.
        input_shape: instead of a size, channels, height and width of one input.
        width: as for `build`.
        seed: seed of random weights.

    Raises:
        UsageError: the input does not have three dimensions, or the weights are not a file of this network.
        FileError: the file of weights does not exist.
        FormatError: the file of weights cannot be read.
    """
    own = MODELS[name].input_shape
    shape = input_shape or (own if input_size is None else (own[0], input_size, input_size))
    if len(shape) != 3:
        raise UsageError(f"--input-shape {list(shape)} does not fit {name}; give channels, height and width.")
    if weights is not None and not is_state_file(weights):
        raise UsageError(
            f"--weights {weights!r} is not a file, and {name} has no published weights; give a state_dict file, or "
            f"leave it out."
        )
    # A fork, so that the caller's random state is as it was: a conversion must not change a training that follows.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build(name, num_classes or _CLASSES, shape, width)
    record = fill_from_file(module, name, weights)
    config = ModelConfig(
        source="paper",
        architecture=name,
        num_classes=num_classes or _CLASSES,
        input_shape=shape,
        preprocessing=_preprocessing(shape),
        conversion=record,
        width=width,
    )
    return module, config


def _preprocessing(shape: tuple[int, ...]) -> Preprocessing:
    """Returns the preprocessing of whole pictures to [-1, 1]; a training replaces it by its data's statistics."""
    # Pictures are cropped to squares; for another shape they stay as they are.
    side = shape[1] if shape[1] == shape[2] else 0
    half = (0.5,) * shape[0]
    return Preprocessing(side, side, half, half)


def _preset_dense(block: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Returns the layers of wide residual networks that the code of Mostafa & Wang kept dense."""
    if isinstance(block, WideBlock) and block.shortcut is not None:
        yield block.shortcut, "convolution on a shortcut"
    if isinstance(block, WideResNet):
        yield block.fc, "classifier of a wide residual network"


SOURCE = Source(
    name="paper",
    recognises=MODELS.__contains__,
    load=load,
    structure=structure,
    names=lambda: list(MODELS),
    widths=tuple(MODELS),
    preset_dense=_preset_dense,
)
"""The row of this source."""
