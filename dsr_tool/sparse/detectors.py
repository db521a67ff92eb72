"""Detectors of torchvision as networks that take a batch tensor and return tensors of fixed shapes.

A detector takes a list of pictures and returns boxes, as many as it finds, so two versions of it cannot be compared
output by output. Its tensor form ends before the boxes are chosen.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Protocol, cast

import torch
import torch.fx
from torch import nn

__all__ = ["REGIONS", "TensorDetector", "detector_kind"]

REGIONS = 16
"""Regions of a picture that the second stage of a detector gets; enough to see the whole picture at four levels."""

_REGION_CELLS = 14
"""Side of a region in cells of its feature map: the canonical 224 pixels at the level with stride 16 (Lin et al.,
Feature Pyramid Networks, CVPR 2017, equation 1)."""

_DETECTORS = ("GeneralizedRCNN", "RetinaNet", "FCOS", "SSD")
"""Names of torchvision's classes of detectors; all others are subclasses."""


def detector_kind(module: nn.Module) -> str | None:
    """Returns the name of torchvision's class of detectors that a module belongs to; None for any other network."""
    # By name: importing torchvision would double the time that programs without a detector take to start.
    if "torchvision.models.detection" not in sys.modules:
        return None
    bases = [base for base in type(module).__mro__ if base.__module__.startswith("torchvision.models.detection.")]
    return next((base.__name__ for base in bases if base.__name__ in _DETECTORS), None)


class TensorDetector(nn.Module):
    """A detector of torchvision up to its raw predictions, without resizing and without the choice of boxes.

    It takes pictures of shape (batch, 3, height, width) with values in [0, 1], and returns tensors of fixed shapes:
    the predictions of the heads at every position and, with two stages, those for regions that depend on the
    size of the pictures alone, so that two versions of the network are asked about the same regions. Without regions,
    the maps that a second stage would read take their place. `torch.fx` can trace it. All children but `transform` are
    those of the detector.
    """

    def __init__(self, detector: nn.Module, regions: int | None = REGIONS) -> None:
        """Shares the children of a detector; see `tensor_form`."""
        super().__init__()
        for name, child in detector.named_children():
            self.add_module(name, child)
        self.training = detector.training
        transform = cast("_Transform", detector.transform)
        self._mean, self._std = list(transform.image_mean), list(transform.image_std)
        self._two_stages = detector_kind(detector) == "GeneralizedRCNN"
        self._boxes = self._others = regions or 0
        if regions is None and self._two_stages:
            # Masks and keypoints are predicted for the boxes that are left at the end.
            self._boxes = cast("_Proposals", detector.rpn)._post_nms_top_n["testing"]
            self._others = cast("_RoiHeads", detector.roi_heads).detections_per_img

    def forward(self, pictures: torch.Tensor) -> object:
        """Returns the raw predictions, nested as the heads return them; see `float_tensors`."""
        features = self.get_submodule("backbone")(_normalise(pictures, self._mean, self._std))
        maps = dict(features) if isinstance(features, Mapping) else {"0": features}
        levels = list(maps.values())
        if not self._two_stages:
            return self.get_submodule("head")(levels)
        objectness, deltas = self.get_submodule("rpn.head")(levels)
        first = {"objectness": objectness, "pred_bbox_deltas": deltas}
        return {**first, **(self._second_stage(maps) if self._boxes else {"features": maps})}

    def _second_stage(self, maps: Mapping[str, torch.Tensor]) -> dict[str, object]:
        """Returns the predictions for regions: classes and boxes, and masks or keypoints if the detector has them."""
        heads = self.get_submodule("roi_heads")
        predictor = heads.get_submodule("box_predictor")
        found = heads.get_submodule("box_head")(self._pooled("box", maps, self._boxes))
        if type(predictor).__name__ == "FastRCNNPredictor":
            # Its own forward asks for the rank of its input, which is 2 here; no trace can answer that.
            parts = {"class_logits": "cls_score", "box_regression": "bbox_pred"}
            outputs: dict[str, object] = {name: predictor.get_submodule(part)(found) for name, part in parts.items()}
        else:
            outputs = {"box": predictor(found)}
        for kind in ("mask", "keypoint"):
            if getattr(heads, f"{kind}_head", None) is not None:
                found = heads.get_submodule(f"{kind}_head")(self._pooled(kind, maps, self._others))
                outputs[f"{kind}_logits"] = heads.get_submodule(f"{kind}_predictor")(found)
        return outputs

    def _pooled(self, kind: str, maps: Mapping[str, torch.Tensor], regions: int) -> torch.Tensor:
        """Returns the features of regions, those of the finest level first: (batch * regions, channels, *size)."""
        pool = cast("_RoiPool", self.get_submodule(f"roi_heads.{kind}_roi_pool"))
        used = [maps[name] for name in pool.featmap_names if name in maps]
        share, more = divmod(regions, len(used))
        size, ratio = list(pool.output_size), pool.sampling_ratio
        return torch.cat([_regions(level, share + (i < more), size, ratio) for i, level in enumerate(used)])


class _Transform(Protocol):
    """The settings of a detector's transform that its tensor form needs."""

    image_mean: Sequence[float]
    image_std: Sequence[float]


class _Proposals(Protocol):
    """The settings of a region proposal network that its tensor form needs."""

    _post_nms_top_n: Mapping[str, int]


class _RoiHeads(Protocol):
    """The settings of the heads of a second stage that the tensor form needs."""

    detections_per_img: int


class _RoiPool(Protocol):
    """The settings of `torchvision.ops.MultiScaleRoIAlign`."""

    featmap_names: Sequence[str]
    output_size: Sequence[int]
    sampling_ratio: int


@torch.fx.wrap
def _normalise(pictures: torch.Tensor, mean: list[float], std: list[float]) -> torch.Tensor:
    """Returns pictures as a detector's backbone gets them."""
    return (pictures - pictures.new_tensor(mean)[:, None, None]) / pictures.new_tensor(std)[:, None, None]


@torch.fx.wrap
def _regions(features: torch.Tensor, count: int, size: list[int], ratio: int) -> torch.Tensor:
    """Returns the features of `count` squares, evenly spread over each map, shape (batch * count, channels, *size)."""
    from torchvision.ops import roi_align

    batch, _, height, width = features.shape
    side = math.ceil(math.sqrt(count))
    boxes = []
    for i in range(count):
        # Centres on a grid; at the border of the map, the square moves inwards.
        tall, wide = min(_REGION_CELLS, height), min(_REGION_CELLS, width)
        top = (height - tall) * (i // side) / max(side - 1, 1)
        left = (width - wide) * (i % side) / max(side - 1, 1)
        boxes.append([left, top, left + wide, top + tall])
    one = features.new_tensor(boxes).reshape(count, 4)
    picture = torch.arange(batch, device=features.device, dtype=features.dtype).repeat_interleave(count)
    rois = torch.cat([picture[:, None], one.repeat(batch, 1)], dim=1)
    return cast("torch.Tensor", roi_align(features, rois, size, 1.0, ratio))
