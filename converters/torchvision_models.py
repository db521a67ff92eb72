"""Source: torchvision's classification, segmentation and video models, by name."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torchvision import models
from torchvision.models import WeightsEnum
from torchvision.models.regnet import ResBottleneckBlock
from torchvision.models.resnet import BasicBlock, Bottleneck

from converters.base import Source
from converters.state_dicts import is_state_file, load_strictly, read_state
from converters.widths import WIDTHS
from dsr_tool.errors import FileError, UsageError, unknown_name
from dsr_tool.sparsity.config import ModelConfig, Preprocessing

__all__ = ["SOURCE", "TASKS", "architectures", "build", "load", "structure"]

TASKS: dict[str, ModuleType] = {"classification": models, "segmentation": models.segmentation, "video": models.video}
"""The modules of torchvision with models that map one tensor to one tensor, by task."""

_OTHER_TASKS = {
    models.detection: "a detector, which takes a list of pictures and returns lists of boxes of any length",
    models.optical_flow: "an optical-flow model, which takes two pictures at once",
    models.quantization: "a model for 8-bit integers, whose weights torch keeps packed",
}
"""Modules of torchvision with other models, and why those cannot be converted."""
_IMAGENET_CLASSES = 1000
_FRAMES = 16
"""Frames per clip; torchvision's own video weights were trained on clips of this length."""
_OWN_NORMALISATION = ("googlenet", "inception_v3")
"""With their trained weights, torchvision builds these to undo ImageNet's normalisation inside; here the
preprocessing has mean and standard deviation 0.5 instead."""
_AUXILIARY = "aux_classifier."
"""Prefix of the auxiliary head of trained segmentation models; their output in eval mode does not depend on it."""


def architectures(task: str | None = None) -> list[str]:
    """Returns the names of the models of the installed torchvision that can be converted: of one task, or of all."""
    names: list[str] = []
    for module in TASKS.values() if task is None else (TASKS[task],):
        names += models.list_models(module=module)
    return names


def build(name: str, num_classes: int | None = None, width: float = 1.0) -> nn.Module:
    """Returns a randomly initialised model.

    Args:
        name: torchvision's name.
        num_classes: number of outputs; torchvision's own when absent.
        width: factor on the architecture's own width, for those in `WIDTHS`.

    Raises:
        UsageError: torchvision has no model of that name, or one that does not map a tensor to a tensor.
    """
    task = _task(name)
    if width != 1:
        if name not in WIDTHS:
            raise UsageError(f"width {width:g} is not allowed for {name}, which can only be built with width 1.")
        return WIDTHS[name](width, num_classes or _IMAGENET_CLASSES)
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if name in _OWN_NORMALISATION:
        options["init_weights"] = True  # without it, these two warn that the default will change
    if task == "segmentation":
        options["weights_backbone"] = None  # without it, torchvision downloads a trained backbone
    module: nn.Module = models.get_model(name, weights=None, **options)
    return module


def structure(name: str, num_classes: int | None = None, width: float = 1.0) -> nn.Module:
    """Returns a model without values, on the meta device, to be filled with `load_state_dict(..., assign=True)`.

    If the builder computes with values, which the meta device does not have (RegNet), the model is a real one.
    """
    try:
        with torch.device("meta"):
            return build(name, num_classes, width)
    except NotImplementedError:
        return build(name, num_classes, width)


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
    task = _task(name)
    enum: WeightsEnum | None = None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if weights is None:
            module = build(name, num_classes, width)
        elif is_state_file(weights):
            module = _with_state(name, read_state(Path(weights)), num_classes, weights)
        else:
            module, enum = _from_enum(name, weights, num_classes)
    own_head = num_classes is None or num_classes == len(_categories(enum))
    shape = input_shape or _input_shape(name, task, module, enum, input_size)
    config = ModelConfig(
        source="torchvision",
        architecture=name,
        num_classes=num_classes or _head(module)[1],
        input_shape=shape,
        preprocessing=_preprocessing(name, enum, shape[-1], trained=weights is not None),
        labels=tuple(_categories(enum)) if own_head else (),
        conversion={"weights": weights if enum is None else str(enum)},
        width=width,
    )
    return module, config


def _task(name: str) -> str:
    """Returns the task of a model.

    Raises:
        UsageError: torchvision has no model of that name that can be converted.
    """
    for task in TASKS:
        if name in architectures(task):
            return task
    raise unknown_name("ARCH", name, architectures())


def _reason(name: str) -> str | None:
    """Returns why a model of torchvision cannot be converted; None for any other name."""
    reasons = (reason for module, reason in _OTHER_TASKS.items() if name in models.list_models(module=module))
    return next(reasons, None)


def _from_enum(name: str, weights: str, num_classes: int | None) -> tuple[nn.Module, WeightsEnum]:
    """Returns a model with published weights, downloaded if they are not in torch's cache."""
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
    return _with_state(name, state, num_classes, str(enum)), enum


def _with_state(name: str, state: Mapping[str, torch.Tensor], num_classes: int | None, what: str) -> nn.Module:
    """Returns a model with a state loaded strictly, and a new head if another number of classes is wanted."""
    module = structure(name)
    if not any(key.startswith(_AUXILIARY) for key in module.state_dict()):
        state = {key: value for key, value in state.items() if not key.startswith(_AUXILIARY)}
    path, outputs = _head(module)
    # The file may hold a model with another number of classes than torchvision's default.
    head = state.get(f"{path}.weight")
    if head is not None and head.ndim >= 2 and head.shape[0] != outputs:
        outputs = head.shape[0]
        module = structure(name, outputs)
    load_strictly(module, name, state, what)
    if num_classes in (None, outputs):
        return module
    # A new head: everything that has the same shape in both is copied, the rest keeps its random values.
    target = build(name, num_classes or outputs)
    fitting = {key: value.shape for key, value in target.state_dict().items()}
    kept = {key: value for key, value in module.state_dict().items() if fitting.get(key) == value.shape}
    target.load_state_dict(kept, strict=False)
    return target


def _head(module: nn.Module) -> tuple[str, int]:
    """Returns name and outputs of the last linear or convolutional layer: the classifier in every torchvision model."""
    layers = {
        path: child for path, child in module.named_modules() if isinstance(child, (nn.Linear, nn.Conv2d, nn.Conv3d))
    }
    path, layer = list(layers.items())[-1]
    return path, int(layer.weight.shape[0])


def _input_shape(
    name: str, task: str, module: nn.Module, enum: WeightsEnum | None, size: int | None
) -> tuple[int, ...]:
    """Returns the shape for a square of `size`, or else that of the weights or of the architecture."""
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
        usual = Preprocessing(
            round(int(transforms.resize_size[0]) * size / int(crop[0])),
            size,
            tuple(transforms.mean),
            tuple(transforms.std),
            str(transforms.interpolation.value),
        )
    if trained and name in _OWN_NORMALISATION:
        usual = replace(usual, mean=(0.5,) * 3, std=(0.5,) * 3)
    return usual


def _categories(enum: WeightsEnum | None) -> list[str]:
    return [] if enum is None else list(enum.meta["categories"])


def _structure_of(config: ModelConfig) -> nn.Module:
    return structure(config.architecture, config.num_classes, config.width)


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
    reason=_reason,
    widths=tuple(WIDTHS),
    preset_dense=_preset_dense,
)
"""The row of this source."""
