"""Source: torchvision's models for classification, segmentation, video and detection, with published weights."""

from __future__ import annotations

import contextlib
import io
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
from converters.checkpoints import Found
from converters.state_dicts import fitting, is_state_file, load_strictly, read_weights
from converters.torch_prune import prune_module
from converters.torchvision_builders import OWN_NORMALISATION, architectures, build, reason, structure, task_of
from converters.torchvision_similar import similar_architecture
from converters.widths import WIDTHS
from dsr_tool.errors import FileError, UsageError, unknown_name
from dsr_tool.sparse.feeding import detector_kind
from dsr_tool.sparsity.config import ModelConfig, Preprocessing

__all__ = ["SOURCE", "load"]

_FRAMES = 16
"""Frames per clip; torchvision's own video weights were trained on clips of this length."""
_AUXILIARY = ("aux_classifier.", "aux1.", "aux2.", "AuxLogits.")
"""Prefixes of auxiliary heads, which files may have or lack; the output in eval mode does not depend on them."""


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
            found = read_weights(weights, structure(name), _AUXILIARY)
            module, record = _with_state(name, found, num_classes, weights)
        else:
            module, record, enum = _from_enum(name, weights, num_classes)
    # Class names belong to the head of the weights; a new head has none.
    own_head = num_classes is None or num_classes == len(_categories(enum))
    shape = input_shape or _input_shape(name, task, module, enum, input_size)
    origin = weights if enum is None else str(enum)
    if task == "detection":
        module = detectors.adapt(module, name, origin, shape)
    config = ModelConfig(
        source="torchvision",
        architecture=name,
        num_classes=num_classes or _head(module)[1],
        input_shape=shape,
        preprocessing=detectors.preprocessing(shape[-1])
        if task == "detection"
        else _preprocessing(name, enum, shape[-1], trained=weights is not None),
        labels=tuple(_categories(enum)) if own_head else (),
        conversion={"weights": origin, **record},
        width=width,
    )
    return module, config


def _from_enum(name: str, weights: str, num_classes: int | None) -> tuple[nn.Module, dict[str, Any], WeightsEnum]:
    """Returns a model with published weights, downloaded if they are not in torch's cache; else as `_with_state`."""
    enum_class = models.get_model_weights(name)
    short = weights.removeprefix(f"{enum_class.__name__}.")
    known = list({"DEFAULT": None, **enum_class.__members__})
    if short not in known:
        prefix = f"{enum_class.__name__}." if "." in weights else ""
        raise unknown_name("--weights", weights, [prefix + key for key in known])
    enum: WeightsEnum = enum_class[short]
    try:
        # torch.hub announces the download on stderr even without a progress bar.
        with contextlib.redirect_stderr(io.StringIO()):
            state = enum.get_state_dict(progress=False, check_hash=True)
    except OSError as error:
        raise FileError(
            f"--weights {weights!r} could not be downloaded ({error}); give the path of a state_dict file instead."
        ) from error
    return *_with_state(name, fitting(state, structure(name), _AUXILIARY), num_classes, str(enum)), enum


def _with_state(name: str, found: Found, num_classes: int | None, what: str) -> tuple[nn.Module, dict[str, Any]]:
    """Returns a model with a state loaded strictly, and a new head if another number of classes is wanted.

    Returns:
        The model, pruned by torch's hooks if the file has masks; and what the description of the model records:
        `weights_read`, how the weights were found in the file, and `fresh`, the names of random parameters.
    """
    # Without values: random ones would be replaced at once.
    module = structure(name)
    found = detectors.with_new_names(found, module)
    path, outputs, each = _head(module)
    # The file may hold a model with another number of classes than torchvision's default.
    head = found.state.get(f"{path}.weight")
    if head is not None and head.ndim >= 2 and head.shape[0] not in (0, outputs * each):
        outputs = max(1, head.shape[0] // each)
        module = structure(name, outputs)
    fresh = [key for key in module.state_dict() if key not in found.state and key.startswith(_AUXILIARY)]
    fresh += _missing_head(found, path, num_classes, what, name)
    random = build(name, outputs).state_dict() if fresh else {}
    try:
        load_strictly(module, name, {**found.state, **{key: random[key] for key in fresh}}, what, found.label)
    except UsageError as error:
        if (other := similar_architecture(name, found.state, _AUXILIARY)) is None:
            raise
        raise UsageError(
            f"--weights {what!r} is no state_dict of {name}, but of {other}; give that as ARCH."
        ) from error
    if num_classes not in (None, outputs):
        # A new head: everything that has the same shape in both is copied, the rest keeps its random values.
        target = build(name, num_classes or outputs)
        shapes = {key: value.shape for key, value in target.state_dict().items()}
        kept = {key: value for key, value in module.state_dict().items() if shapes.get(key) == value.shape}
        target.load_state_dict(kept, strict=False)
        fresh += [key for key in shapes if key not in kept]
        module = target
    parameters = {key for key, _ in module.named_parameters()}
    prune_module(module, found.masks)
    names = sorted(parameters.intersection(fresh))
    return module, {
        **({"weights_read": list(found.notes)} if found.notes else {}),
        **({"fresh": names} if names else {}),
    }


def _missing_head(found: Found, path: str, num_classes: int | None, what: str, name: str) -> list[str]:
    """Returns the names of a head that a file lacks, if nothing else is missing and a new head is wanted anyway.

    Raises:
        UsageError: the head is missing, and no number of classes is given.
    """
    child = path.partition(".")[0]
    if not found.missing or not all(key.startswith(f"{child}.") for key in found.missing):
        return []
    if num_classes is None:
        raise UsageError(
            f"--weights {what!r} holds {name} without its head {child!r}, as files for transfer do; give --num-classes "
            f"for a new one."
        )
    return list(found.missing)


def _head(module: nn.Module) -> tuple[str, int, int]:
    """Returns the path of the layer that predicts classes, their number, and the layer's outputs for each.

    In every model but a detector, it is the last linear or convolutional layer.
    """
    if detector_kind(module) is not None:
        return detectors.class_head(module)
    layers = {
        path: child for path, child in module.named_modules() if isinstance(child, (nn.Linear, nn.Conv2d, nn.Conv3d))
    }
    path, layer = list(layers.items())[-1]
    return path, int(layer.weight.shape[0]), 1


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
