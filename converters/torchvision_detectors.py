"""Peculiarities of torchvision's detectors: a class head in the middle, frozen norms, picture size, renamed layers."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Protocol, cast

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - its usual name

from converters.checkpoints import Found
from dsr_tool.sparsity.config import Preprocessing

__all__ = ["FrozenNorm", "adapt", "class_head", "picture_size", "preprocessing", "with_new_names"]

_NEVER_FROZEN = ("ssd300_vgg16", "ssdlite320_mobilenet_v3_large")
"""Detectors whose norms torchvision trains, as it does those of all names that end in `_v2`."""
_NO_EPSILON = ("fasterrcnn", "maskrcnn", "keypointrcnn", "retinanet")
"""Beginnings of `*_resnet50_fpn` whose weights `COCO_V1` were trained with norms that add nothing to the variance."""

_RENAMED: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], str]], ...] = (
    (re.compile(r"(rpn\.head\.conv)\.(\w+)"), lambda m: f"{m[1]}.0.0.{m[2]}"),
    (re.compile(r"(head\.\w+_head\.conv)\.(\d)\.(\w+)"), lambda m: f"{m[1]}.{int(m[2]) // 2}.0.{m[3]}"),
    (re.compile(r"(roi_heads\.mask_head)\.mask_fcn(\d)\.(\w+)"), lambda m: f"{m[1]}.{int(m[2]) - 1}.0.{m[3]}"),
)
"""Names of layers before torchvision 0.13, which its older published weights still have, and their names since."""


class _Transform(Protocol):
    """The settings of `torchvision.models.detection.transform.GeneralizedRCNNTransform` that are used here."""

    min_size: Sequence[int]
    max_size: int
    fixed_size: tuple[int, int] | None


class FrozenNorm(nn.BatchNorm2d):
    """A batch norm that is the same in training and evaluation, as in torchvision's trained detectors.

    Detectors are trained with a few large pictures per batch, too few for statistics. It is a batch norm, and not
    `torchvision.ops.FrozenBatchNorm2d`, so that the names of the state_dict do not depend on it.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - torch's name
        """Normalises with the stored statistics."""
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


def adapt(module: nn.Module, name: str, weights: str | None, input_shape: tuple[int, ...]) -> nn.Module:
    """Freezes norms where torchvision does, and makes the detector scale pictures to the size of its input.

    Args:
        module: a detector with its values, or without; changed in place.
        name: torchvision's name.
        weights: the weights in it, as `config.conversion` records them; None for random ones.
        input_shape: channels, height and width of one input.

    Returns:
        The detector.
    """
    if weights is not None and not name.endswith("_v2") and name not in _NEVER_FROZEN:
        old = name.removesuffix("_resnet50_fpn") in _NO_EPSILON and weights.endswith(".COCO_V1")
        _freeze_norms(module.get_submodule("backbone"), 0.0 if old else None)
    height, width = input_shape[-2:]
    transform = cast("_Transform", module.transform)
    if transform.fixed_size is not None:
        transform.fixed_size = (width, height)
    elif min(height, width) != transform.min_size[-1]:
        longest = round(transform.max_size * min(height, width) / transform.min_size[-1])
        transform.min_size, transform.max_size = (min(height, width),), max(longest, height, width)
    return module


def class_head(module: nn.Module) -> tuple[str, int, int]:
    """Returns the path of the layer that predicts classes, their number, and the layer's outputs for each.

    An SSD has such a layer for every feature map; the first stands for all of them.
    """
    if hasattr(module, "roi_heads"):
        path = "roi_heads.box_predictor.cls_score"
        return path, len(cast("torch.Tensor", module.get_submodule(path).weight)), 1
    head = module.get_submodule("head.classification_head")
    classes = int(getattr(head, "num_columns" if hasattr(head, "num_columns") else "num_classes"))
    inside = "module_list.0" if hasattr(head, "module_list") else "cls_logits"
    layers = {p: m for p, m in head.get_submodule(inside).named_modules() if isinstance(m, nn.Conv2d)}
    path, layer = list(layers.items())[-1]
    return ".".join(filter(None, ("head.classification_head", inside, path))), classes, layer.out_channels // classes


def picture_size(module: nn.Module) -> int:
    """Returns the side in pixels to which a detector scales the short side of a picture."""
    transform = cast("_Transform", module.transform)
    return int(transform.fixed_size[0] if transform.fixed_size is not None else transform.min_size[-1])


def preprocessing(size: int) -> Preprocessing:
    """Returns the preprocessing of a detector's input, which normalises by itself."""
    return Preprocessing(size, size, mean=(0.0,) * 3, std=(1.0,) * 3)


def with_new_names(found: Found, module: nn.Module) -> Found:
    """Returns the entries of a file with layers that were renamed under the names that the module has."""
    own = module.state_dict().keys()
    state = {key if key in own else _new_name(key, own): value for key, value in found.state.items()}
    return replace(found, state=state, missing=tuple(key for key in found.missing if key not in state))


def _new_name(key: str, own: Collection[str]) -> str:
    renamed = (pattern.fullmatch(key) for pattern, _ in _RENAMED)
    names = (new(match) for match, (_, new) in zip(renamed, _RENAMED, strict=True) if match)
    return next((name for name in names if name in own), key)


def _freeze_norms(backbone: nn.Module, epsilon: float | None) -> None:
    """Replaces the batch norms of a backbone by frozen ones with the same tensors."""
    for owner in backbone.modules():
        for name, norm in owner.named_children():
            if type(norm) is nn.BatchNorm2d:
                frozen = FrozenNorm(norm.num_features, norm.eps if epsilon is None else epsilon, device="meta")
                frozen.load_state_dict(norm.state_dict(), assign=True)
                setattr(owner, name, frozen.requires_grad_(requires_grad=False))
