"""Feeds a batch tensor to any network: most take one, and torchvision's detectors get a form that does.

A detector takes a list of pictures and returns boxes, as many as it finds, so two versions of it cannot be compared
output by output. Its tensor form ends before the boxes are chosen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, cast

import torch
import torch.fx
from torch import nn

from dsr_tool.errors import UsageError

__all__ = [
    "REGIONS",
    "TensorDetector",
    "detector_kind",
    "evaluating",
    "float_tensors",
    "main_output",
    "plain_attention",
    "require_floats",
    "tensor_form",
]

REGIONS = 16
"""Regions of a picture that the second stage of a detector gets; enough to see the whole picture at four levels."""

_REGION_CELLS = 14
"""Side of a region in cells of its feature map: the canonical 224 pixels at the level with stride 16 (Lin et al.,
Feature Pyramid Networks, CVPR 2017, equation 1)."""

_COMPARED = (torch.float16, torch.float32, torch.float64)
"""Types of outputs that runtimes have."""

_DETECTORS = ("GeneralizedRCNN", "RetinaNet", "FCOS", "SSD")
"""Names of torchvision's classes of detectors; all others are subclasses."""


def detector_kind(module: nn.Module) -> str | None:
    """Returns the name of torchvision's class of detectors that a module belongs to; None for any other network."""
    # By name: importing torchvision would double the time that programs without a detector take to start.
    if "torchvision.models.detection" not in sys.modules:
        return None
    bases = [base for base in type(module).__mro__ if base.__module__.startswith("torchvision.models.detection.")]
    return next((base.__name__ for base in bases if base.__name__ in _DETECTORS), None)


def tensor_form(module: nn.Module, regions: int | None = REGIONS) -> nn.Module:
    """Returns a network that takes a batch tensor and has the parameters of `module` under the same names.

    The children are shared, so hooks, training flags and changed weights are seen in both.

    Args:
        module: the network.
        regions: for detectors with two stages, the regions of each picture that the second one gets; None for as many
            as it gets at most.

    Returns:
        The module itself, or for a detector of torchvision its `TensorDetector`.
    """
    return module if detector_kind(module) is None else TensorDetector(module, regions)


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Puts a module into eval mode without gradients and with `plain_attention`, and gives every flag back."""
    training = {child: child.training for child in module.modules()}
    module.eval()
    try:
        with plain_attention(), torch.no_grad():
            yield
    finally:
        for child, mode in training.items():
            child.training = mode


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Turns off the fused attention of eval mode, which is one operator that only torch has."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def float_tensors(output: object) -> list[torch.Tensor]:
    """Returns the tensors of real numbers in an output, in a fixed order.

    Args:
        output: a tensor, or any nesting of mappings, lists, tuples and dataclasses; a mapping with a key `out` counts
            as that entry, since the others are auxiliary heads.
    """
    return list(_flatten(output))


def main_output(output: object, network: str) -> torch.Tensor:
    """Returns the one tensor of real numbers in an output; what lies beside it, such as None, does not count.

    Args:
        output: see `float_tensors`.
        network: name of the network's class, for messages.

    Raises:
        UsageError: there is no such tensor, or there are several.
    """
    found = require_floats(output, network)
    if len(found) > 1:
        raise UsageError(
            f"{network} returns {len(found)} tensors; wrap it in a module that returns one, or a mapping with the key "
            f"'out'."
        )
    return found[0]


def require_floats(output: object, network: str) -> list[torch.Tensor]:
    """Returns `float_tensors` of an output.

    Args:
        output: the output.
        network: name of the network's class, for messages.

    Raises:
        UsageError: there are none, or their type is one that numpy lacks.
    """
    found = float_tensors(output)
    if not found:
        what = f"a tensor of {output.dtype}" if isinstance(output, torch.Tensor) else type(output).__name__
        raise UsageError(
            f"{network} returns {what} in eval mode, and an export compares tensors of real numbers; return the scores "
            f"that it is computed from, as a tensor or in a tuple, list or mapping."
        )
    other = next((tensor.dtype for tensor in found if tensor.dtype not in _COMPARED), None)
    if other is not None:
        raise UsageError(f"{network} returns a tensor of {other}; return it as float32 (output.float()).")
    return found


def _flatten(output: object) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        yield from _flatten(output["out"] if "out" in output else list(output.values()))
    elif isinstance(output, Sequence) and not isinstance(output, str):
        for part in output:
            yield from _flatten(part)
    elif dataclasses.is_dataclass(output):
        yield from _flatten([getattr(output, field.name) for field in dataclasses.fields(output)])


class TensorDetector(nn.Module):
    """A detector of torchvision up to its raw predictions, without resizing and without the choice of boxes.

    It takes pictures of shape (batch, 3, height, width) with values in [0, 1], and returns tensors of fixed shapes:
    the predictions of the heads at every position and, with two stages, those for regions that depend on the
    size of the pictures alone, so that two versions of the network are asked about the same regions. `torch.fx` can
    trace it. All children but `transform` are those of the detector.
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
        return [self.get_submodule("rpn.head")(levels), *self._second_stage(maps)]

    def _second_stage(self, maps: Mapping[str, torch.Tensor]) -> list[object]:
        """Returns the predictions for regions: classes and boxes, and masks or keypoints if the detector has them."""
        heads = self.get_submodule("roi_heads")
        predictor = heads.get_submodule("box_predictor")
        found = heads.get_submodule("box_head")(self._pooled("box", maps, self._boxes))
        if type(predictor).__name__ == "FastRCNNPredictor":
            # Its own forward asks for the rank of its input, which is 2 here; no trace can answer that.
            outputs: list[object] = [predictor.get_submodule(part)(found) for part in ("cls_score", "bbox_pred")]
        else:
            outputs = [predictor(found)]
        for kind in ("mask", "keypoint"):
            if getattr(heads, f"{kind}_head", None) is not None:
                found = heads.get_submodule(f"{kind}_head")(self._pooled(kind, maps, self._others))
                outputs.append(heads.get_submodule(f"{kind}_predictor")(found))
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
