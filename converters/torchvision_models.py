"""Source: torchvision's models for classification, segmentation, video and detection, with published weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torchvision import models
from torchvision.models import WeightsEnum
from torchvision.models.regnet import ResBottleneckBlock
from torchvision.models.resnet import BasicBlock, Bottleneck

from converters import torchvision_detectors as detectors
from converters.base import Source
from converters.state_dicts import is_state_file
from converters.torchvision_builders import OWN_NORMALISATION, architectures, build, reason, structure, task_of
from converters.torchvision_weights import class_head, from_enum, from_file
from converters.widths import WIDTHS
from dsr_tool.sparse.detectors import detector_kind
from dsr_tool.sparsity.config import ModelConfig, Preprocessing

__all__ = ["SOURCE", "load"]

_FRAMES = 16
"""Frames per clip; torchvision's own video weights were trained on clips of this length."""


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
    """Builds a model, fills in its weights, and describes it.

    Args:
        name: torchvision's name (`resnet50`).
        weights: enum name (`ResNet50_Weights.IMAGENET1K_V2`, `IMAGENET1K_V2`, `DEFAULT`), a state_dict file, or None
            for random weights.
        num_classes: number of outputs; if it differs from that of the weights, the model gets a new head.
        input_size: side of the square input in pixels; the architecture's own when absent.
        input_shape: instead of a size, the shape of one input: channels, frames for video, height, width.
        width: factor on the architecture's own width, with random weights.
        seed: seed of random weights.

    Raises:
        UsageError: unknown name or weights, or weights of another architecture.
        FileError: the weights cannot be downloaded.
        FormatError: the state_dict file cannot be read.
    """
    task = task_of(name)
    enum: WeightsEnum | None = None
    record: dict[str, Any] = {}
    # A fork, so that the caller's random state is as it was: a conversion must not change a training that follows.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if weights is None:
            module = build(name, num_classes, width)
        elif is_state_file(weights):
            module, record = from_file(name, weights, num_classes)
        else:
            module, record, enum = from_enum(name, weights, num_classes)
    # Class names belong to the head of the weights; a new head has none.
    own_head = num_classes is None or num_classes == len(_categories(enum))
    shape = input_shape or _input_shape(name, task, module, enum, input_size)
    origin = weights if enum is None else str(enum)
    if task == "detection":
        module = detectors.adapt(module, name, origin, shape)
    config = ModelConfig(
        source="torchvision",
        architecture=name,
        num_classes=num_classes or class_head(module)[1],
        input_shape=shape,
        preprocessing=detectors.preprocessing(shape[-1])
        if task == "detection"
        else _preprocessing(name, enum, shape[-1], trained=weights is not None),
        labels=tuple(_categories(enum)) if own_head else (),
        conversion={"weights": origin, **record},
        width=width,
    )
    return module, config


def _input_shape(
    name: str, task: str, module: nn.Module, enum: WeightsEnum | None, size: int | None
) -> tuple[int, ...]:
    """Returns the shape for a square of `size`, or else that of the weights or of the architecture."""
    if size is None and task == "detection":
        size = detectors.picture_size(module)
    # Vision transformers have position embeddings for one size, which they know.
    if size is None and enum is None and isinstance(getattr(module, "image_size", None), int):
        size = int(module.image_size)  # type: ignore[arg-type]
    if size is None:
        transforms = (enum or models.get_model_weights(name).DEFAULT).transforms()
        size = int(getattr(transforms, "crop_size", transforms.resize_size)[0])
    return (3, _FRAMES, size, size) if task == "video" else (3, size, size)


def _preprocessing(name: str, enum: WeightsEnum | None, size: int, *, trained: bool) -> Preprocessing:
    """Returns the preprocessing of the weights, or else ImageNet's usual 256 / 224 in proportion to the size."""
    usual = Preprocessing(resize=round(size * 256 / 224), crop=size)
    if enum is not None:
        transforms = enum.transforms()
        crop = getattr(transforms, "crop_size", transforms.resize_size)
        # Resize in proportion, if the input has another size than that of the weights.
        usual = Preprocessing(
            round(int(transforms.resize_size[0]) * size / int(crop[0])),
            size,
            tuple(transforms.mean),
            tuple(transforms.std),
            str(transforms.interpolation.value),
        )
    # These were ported from TensorFlow, whose inputs are in [-1, 1].
    if trained and name in OWN_NORMALISATION:
        usual = replace(usual, mean=(0.5,) * 3, std=(0.5,) * 3)
    return usual


def _categories(enum: WeightsEnum | None) -> list[str]:
    return [] if enum is None else list(enum.meta["categories"])


def _structure_of(config: ModelConfig) -> nn.Module:
    module = structure(config.architecture, config.num_classes, config.width)
    if detector_kind(module) is None:
        return module
    weights = config.conversion.get("weights")
    return detectors.adapt(module, config.architecture, None if weights is None else str(weights), config.input_shape)


def _preset_dense(block: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Returns the projection on the shortcut of a residual block."""
    shortcut = None
    if isinstance(block, (BasicBlock, Bottleneck)):
        shortcut = block.downsample
    elif isinstance(block, ResBottleneckBlock):
        shortcut = block.proj
    if shortcut is not None:
        yield shortcut, "convolution on a shortcut"


SOURCE = Source(
    name="torchvision",
    recognises=lambda name: name in architectures(),
    load=load,
    structure=_structure_of,
    names=architectures,
    reason=reason,
    widths=tuple(WIDTHS),
    preset_dense=_preset_dense,
)
"""The row of this source."""
