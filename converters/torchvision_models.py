"""Source: torchvision's classification, segmentation and video models, by name."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torchvision import models

from converters import paper_models
from converters.state_dicts import is_state_file, load_strictly, read_state
from converters.widths import WIDTHS
from dsr_tool.errors import FileError, UsageError, unknown_name
from dsr_tool.sparsity.config import ModelConfig, Preprocessing

__all__ = ["TASKS", "architectures", "build", "load", "structure"]

TASKS: dict[str, ModuleType] = {"classification": models, "segmentation": models.segmentation, "video": models.video}
"""Where torchvision keeps the models that map one tensor to one tensor."""

_OTHER_TASKS = {
    models.detection: "a detector, which takes a list of pictures and returns lists of boxes of any length",
    models.optical_flow: "an optical-flow model, which takes two pictures at once",
    models.quantization: "a model for 8-bit integers, whose weights torch keeps packed",
}
_IMAGENET_CLASSES = 1000
_FRAMES = 16  # torchvision's own video weights were made for clips of this length
_OWN_NORMALISATION = ("googlenet", "inception_v3")
"""With its own weights torchvision builds these to undo ImageNet's normalisation inside; ours take 0.5 outside."""
_AUXILIARY = "aux_classifier."
"""Head beside the main one of trained segmentation models; their output in eval mode does not depend on it."""


def architectures(task: str | None = None) -> list[str]:
    """Names of the models of the installed torchvision that can be converted: of one task, or of all."""
    names: list[str] = []
    for module in TASKS.values() if task is None else (TASKS[task],):
        names += models.list_models(module=module)
    return names


def build(name: str, num_classes: int | None = None, width: float = 1.0) -> nn.Module:
    """A randomly initialised model, with as many classes as torchvision gives it unless told otherwise.

    Args:
        name: torchvision's name.
        num_classes: outputs.
        width: factor on the architecture's own width, for those in `WIDTHS`.

    Raises:
        UsageError: torchvision has no model of that name, or one that does not map a tensor to a tensor.
    """
    task = _task(name)
    if width != 1:
        if name not in WIDTHS:
            raise UsageError(f"{name} has no width; it cannot be {width:g} as wide.")
        return WIDTHS[name](width, num_classes or _IMAGENET_CLASSES)
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if name in _OWN_NORMALISATION:
        options["init_weights"] = True  # these two warn unless they are told to use their own initialisation
    if task == "segmentation":
        options["weights_backbone"] = None  # torchvision would download them
    module: nn.Module = models.get_model(name, weights=None, **options)
    return module


def structure(name: str, num_classes: int | None = None, width: float = 1.0) -> nn.Module:
    """A model without values, on the meta device, to be filled with `load_state_dict(..., assign=True)`.

    Where the builder computes with tensors, which the meta device cannot (RegNet), it is a real one.
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
    input_shape: Sequence[int] = (),
    width: float = 1.0,
    seed: int = 0,
) -> tuple[nn.Module, ModelConfig]:
    """Build a model, fill in its weights, and describe it.

    Args:
        name: torchvision's name (`resnet50`).
        weights: enum name (`ResNet50_Weights.IMAGENET1K_V2`, `IMAGENET1K_V2`, `DEFAULT`), a state_dict file, or None
            for random weights.
        num_classes: a new head of so many classes where it differs from what the weights have.
        input_size: side of the square input in pixels; the architecture's own when absent.
        input_shape: instead, the whole shape of one input: channels, frames for video, height, width.
        width: factor on the architecture's own width, with random weights.
        seed: of random weights.

    Raises:
        UsageError: unknown name or weights, weights of another architecture, or a head the model cannot have.
        FormatError: the state_dict file cannot be read.
    """
    task = _task(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if weights is None:
            module, enum = build(name, num_classes, width), None
        elif is_state_file(weights):
            module, enum = _with_state(name, read_state(Path(weights)), num_classes, weights), None
        else:
            module, enum = _from_enum(name, weights, num_classes)
    own_head = num_classes is None or num_classes == len(_categories(enum))
    shape = tuple(input_shape) or _input_shape(name, task, module, enum, input_size)
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
    """The task of a model, or the error that says why there is none."""
    for task in TASKS:
        if name in architectures(task):
            return task
    for module, what in _OTHER_TASKS.items():
        if name in models.list_models(module=module):
            raise UsageError(
                f"ARCH {name!r} is {what}; give a torchvision model for classification, segmentation or video, or "
                f"module:callable for a network of your own."
            )
    if name and ("/" in name or Path(name).suffix or Path(name).exists()):
        raise UsageError(
            f"ARCH {name!r} is a path; give the name of a torchvision model, such as resnet18, or module:callable for "
            f"a network of your own, and a file of its values as --weights."
        )
    raise unknown_name("ARCH", name, [*architectures(), *paper_models.MODELS])


def _from_enum(name: str, weights: str, num_classes: int | None) -> tuple[nn.Module, Any]:
    enum_class = models.get_model_weights(name)
    short = weights.removeprefix(f"{enum_class.__name__}.")
    known = list({"DEFAULT": None, **enum_class.__members__})
    if short not in known:
        prefix = f"{enum_class.__name__}." if "." in weights else ""
        raise unknown_name("--weights", weights, [prefix + key for key in known])
    enum = enum_class[short]
    try:
        # torch.hub announces the download there.
        with contextlib.redirect_stderr(io.StringIO()):
            state = enum.get_state_dict(progress=False, check_hash=True)
    except OSError as error:
        raise FileError(
            f"--weights {weights!r} could not be downloaded ({error}); give the path of a state_dict file instead."
        ) from error
    return _with_state(name, state, num_classes, str(enum)), enum


def _with_state(name: str, state: Mapping[str, torch.Tensor], num_classes: int | None, what: str) -> nn.Module:
    """A model with the state loaded strictly; its head is replaced when another number of classes is asked for."""
    module = structure(name)
    if not any(key.startswith(_AUXILIARY) for key in module.state_dict()):
        state = {key: value for key, value in state.items() if not key.startswith(_AUXILIARY)}
    path, outputs = _head(module)
    head = state.get(f"{path}.weight")
    if head is not None and head.ndim >= 2 and head.shape[0] != outputs:
        outputs = head.shape[0]
        module = structure(name, outputs)
    load_strictly(module, name, state, what)
    if num_classes in (None, outputs):
        return module
    target = build(name, num_classes or outputs)
    fitting = {key: value.shape for key, value in target.state_dict().items()}
    kept = {key: value for key, value in module.state_dict().items() if fitting.get(key) == value.shape}
    target.load_state_dict(kept, strict=False)
    return target


def _head(module: nn.Module) -> tuple[str, int]:
    """Path and outputs of the last linear or convolutional layer: the classifier in every torchvision model."""
    layers = {
        path: child for path, child in module.named_modules() if isinstance(child, (nn.Linear, nn.Conv2d, nn.Conv3d))
    }
    path, layer = list(layers.items())[-1]
    return path, int(layer.weight.shape[0])


def _input_shape(name: str, task: str, module: nn.Module, enum: Any, size: int | None) -> tuple[int, ...]:
    """What the weights, the module or the architecture's default weights were made for, or a square of `size`."""
    if size is None and enum is None and isinstance(getattr(module, "image_size", None), int):
        size = int(module.image_size)  # type: ignore[arg-type]
    if size is None:
        transforms = (enum or models.get_model_weights(name).DEFAULT).transforms()
        size = int(getattr(transforms, "crop_size", transforms.resize_size)[0])
    return (3, _FRAMES, size, size) if task == "video" else (3, size, size)


def _preprocessing(name: str, enum: Any, size: int, *, trained: bool) -> Preprocessing:
    """What the weights were trained with; otherwise ImageNet's usual 256 / 224 in proportion to the size."""
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


def _categories(enum: Any) -> list[str]:
    return [] if enum is None else list(enum.meta["categories"])
