"""Augmentation of training images: batch by batch on their device, or picture by picture as they are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image
from torch.nn import functional
from torchvision.transforms import v2

__all__ = ["AUGMENTATIONS", "ON_ORIGINAL", "Moves", "Picture", "Transform", "draw_moves", "on_original"]

Picture: TypeAlias = torch.Tensor | Image.Image
"""One picture, as a tensor (channels, height, width), uint8 or float32 in [0, 1], or in PIL."""
Transform: TypeAlias = Callable[[Picture], Picture]

AUGMENTATIONS = ("none", "shift", "crop-flip", "imagenet")
ON_ORIGINAL = ("imagenet",)
"""Augmentations that read pictures of any size, one at a time, and crop and resize them to the input themselves."""


def on_original(side: tuple[int, int]) -> Transform:
    """Returns the transform `imagenet` of one picture to `side`, height and width."""
    transform: Transform = v2.Compose([v2.RandomResizedCrop(side, antialias=True), v2.RandomHorizontalFlip()])
    return transform


@dataclass(frozen=True)
class Moves:
    """Shifts and flips of a batch: for each image, the window that is cut out of it, and whether it is mirrored.

    Attributes:
        padding: black pixels added above and below, and left and right of the image.
        down: top edge of the window in the padded image, in [0, 2 * padding[0]]; int64, shape (images,).
        right: left edge of the window, in [0, 2 * padding[1]]; int64, shape (images,).
        flip: whether the window is mirrored left to right, bool, shape (images,); None to mirror none.
    """

    padding: tuple[int, int]
    down: torch.Tensor
    right: torch.Tensor
    flip: torch.Tensor | None

    def to(self, device: torch.device) -> Moves:
        """Returns the moves on a device."""
        return self._each(lambda values: values.to(device))

    def __getitem__(self, rows: slice | torch.Tensor) -> Moves:
        """Returns the moves of some images."""
        return self._each(lambda values: values[rows])

    def _each(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Moves:
        flip = None if self.flip is None else function(self.flip)
        return Moves(self.padding, function(self.down), function(self.right), flip)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Applies the moves to a batch of any type, shape (images, channels, height, width), with one gather."""
        height, width = images.shape[2:]
        above, left = self.padding
        rows = torch.arange(height, device=images.device) + self.down[:, None]
        columns = torch.arange(width, device=images.device)
        if self.flip is not None:  # mirrors the window, so before the window is placed
            columns = torch.where(self.flip[:, None], width - 1 - columns, columns)
        columns = columns + self.right[:, None]
        # Flat positions in the padded image, the same for all channels.
        pixels = (rows[:, :, None] * (width + 2 * left) + columns[:, None, :]).flatten(1)[:, None, :]
        padded = functional.pad(images, [left, left, above, above]).flatten(2)
        return padded.gather(2, pixels.expand(-1, images.shape[1], -1)).view(images.shape)


def draw_moves(name: str, count: int, side: tuple[int, int], random: np.random.Generator) -> Moves | None:
    """Draws the moves of all images of an epoch, or returns None for augmentations that do not work on batches.

    Images are shifted by up to an eighth in each direction (4 pixels of 32, as is usual for CIFAR), with black outside.
    `crop-flip` also mirrors an image with probability 1/2.

    Args:
        name: a name in `AUGMENTATIONS`.
        count: images of the epoch.
        side: height and width of the model's input in pixels.
        random: numpy's generator, so that CPU and GPU apply the same moves.
    """
    if name not in ("shift", "crop-flip"):
        return None
    above, left = padding = (max(side[0] // 8, 1), max(side[1] // 8, 1))
    down, right = (torch.from_numpy(random.integers(2 * edge + 1, size=count)) for edge in (above, left))
    flip = torch.from_numpy(random.random(count) < 0.5) if name == "crop-flip" else None
    return Moves(padding, down, right, flip)
