"""Building torchvision's models, with random weights or without values."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import nn
from torchvision import models

from converters.widths import WIDTHS
from dsr_tool.errors import UsageError, unknown_name

__all__ = ["OWN_NORMALISATION", "TASKS", "architectures", "build", "reason", "structure", "task_of"]

TASKS: dict[str, ModuleType] = {
    "classification": models,
    "segmentation": models.segmentation,
    "video": models.video,
    "detection": models.detection,
}
"""The modules of torchvision with models that can be converted, by task."""
OWN_NORMALISATION = ("googlenet", "inception_v3")
"""Architectures that torchvision builds, with their trained weights, to undo ImageNet's normalisation inside."""

_OTHER_TASKS = {
    models.optical_flow: "an optical-flow model, which takes two pictures at once",
    models.quantization: "a model for 8-bit integers, whose weights torch keeps packed",
}
"""Modules of torchvision with other models, and why those cannot be converted."""
_IMAGENET_CLASSES = 1000
"""Number of classes of torchvision's classifiers."""


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
        num_classes: number of outputs; torchvision's own when absent. Detectors count the background as a class.
        width: factor on the architecture's own width, for those in `WIDTHS`.

    Raises:
        UsageError: torchvision has no model of that name that can be converted.
    """
    task = task_of(name)
    # torchvision's get_model passes no width for most of these, so WIDTHS calls their constructors.
    if width != 1:
        if name not in WIDTHS:
            raise UsageError(f"width {width:g} is not allowed for {name}, which can only be built with width 1.")
        return WIDTHS[name](width, num_classes or _IMAGENET_CLASSES)
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if name in OWN_NORMALISATION:
        options["init_weights"] = True  # without it, these two warn that the default will change
    if task in ("segmentation", "detection"):
        options["weights_backbone"] = None  # without it, torchvision downloads a trained backbone
    module: nn.Module = models.get_model(name, weights=None, **options)
    return module


def structure(name: str, num_classes: int | None = None, width: float = 1.0) -> nn.Module:
    """Returns a model without values, on the meta device, to be filled with `load_state_dict(..., assign=True)`.

    If the builder computes with values, which the meta device does not have, the model is a real one: RegNet, and
    detectors, whose anchors are in no state_dict.
    """
    if task_of(name) == "detection":
        with torch.random.fork_rng(devices=[]):
            return build(name, num_classes, width)
    try:
        with torch.device("meta"):
            return build(name, num_classes, width)
    except NotImplementedError:
        return build(name, num_classes, width)


def task_of(name: str) -> str:
    """Returns the task of a model.

    Raises:
        UsageError: torchvision has no model of that name that can be converted.
    """
    for task in TASKS:
        if name in architectures(task):
            return task
    raise unknown_name("ARCH", name, architectures())


def reason(name: str) -> str | None:
    """Returns why a model of torchvision cannot be converted; None for any other name."""
    for module, why in _OTHER_TASKS.items():
        if name in models.list_models(module=module):
            return why
    return None
