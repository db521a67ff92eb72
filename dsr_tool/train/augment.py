"""Augmentation: what happens to the training images, batch by batch on their device or picture by picture on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torchvision.transforms import v2

__all__ = ["AUGMENTATIONS", "ON_ORIGINAL", "Moves", "Transform", "draw_moves", "on_original"]

Transform = Callable[[Any], Any]

AUGMENTATIONS = ("none", "shift", "crop-flip", "imagenet")
ON_ORIGINAL = ("imagenet",)
"""Those that take pictures of any size, one at a time, and bring them to the size of the input themselves."""


def on_original(side: tuple[int, int]) -> Transform:
    """The transform of one picture (uint8 or float tensor (C, H, W), or PIL image) to `side`, height and width."""
    both: Transform = v2.Compose([v2.RandomResizedCrop(side, antialias=True), v2.RandomHorizontalFlip()])
    return both


@dataclass(frozen=True)
class Moves:
    """How each image of a batch is moved: the window of it that is seen, and whether that is mirrored.

    Attributes:
        padding: black pixels added above and below, and left and right of the image.
        down: upper edge of the window in the padded image, in [0, 2 * padding[0]]; int64, shape (images,).
        right: its left edge, in [0, 2 * padding[1]].
        flip: whether the window is mirrored left to right, shape (images,); None where none is.
    """

    padding: tuple[int, int]
    down: torch.Tensor
    right: torch.Tensor
    flip: torch.Tensor | None

    def to(self, device: torch.device) -> Moves:
        """The same on a device."""
        return self._each(lambda values: values.to(device))

    def __getitem__(self, rows: slice | torch.Tensor) -> Moves:
        """Those of some images."""
        return self._each(lambda values: values[rows])

    def _each(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Moves:
        flip = None if self.flip is None else function(self.flip)
        return Moves(self.padding, function(self.down), function(self.right), flip)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Move a batch, shape (images, channels, height, width) of any type, with one gather."""
        height, width = images.shape[2:]
        above, left = self.padding
        rows = torch.arange(height, device=images.device) + self.down[:, None]
        columns = torch.arange(width, device=images.device)
        if self.flip is not None:
            columns = torch.where(self.flip[:, None], width - 1 - columns, columns)
        columns = columns + self.right[:, None]
        seen = (rows[:, :, None] * (width + 2 * left) + columns[:, None, :]).flatten(1)[:, None, :]
        padded = functional.pad(images, [left, left, above, above]).flatten(2)
        return padded.gather(2, seen.expand(-1, images.shape[1], -1)).view(images.shape)


def draw_moves(name: str, count: int, side: tuple[int, int], random: np.random.Generator) -> Moves | None:
    """Draw what an augmentation does to each image of an epoch; None for those that move nothing in a batch.

    Images are shifted by up to an eighth in each direction (4 pixels of 32, as is usual for CIFAR), black outside;
    `crop-flip` also mirrors every other image.

    Args:
        name: one of `AUGMENTATIONS`.
        count: images of the epoch.
        side: height and width of the model's input in pixels.
        random: source of randomness; the same draws are applied on a CPU and on a GPU.
    """
    if name not in ("shift", "crop-flip"):
        return None
    above, left = padding = (max(side[0] // 8, 1), max(side[1] // 8, 1))
    down, right = (torch.from_numpy(random.integers(2 * edge + 1, size=count)) for edge in (above, left))
    flip = torch.from_numpy(random.random(count) < 0.5) if name == "crop-flip" else None
    return Moves(padding, down, right, flip)
