"""Augmentation: what happens to each training image, by torchvision's transforms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torchvision.transforms import v2

__all__ = ["AUGMENTATIONS", "ON_ORIGINAL", "augmentation"]

Transform = Callable[[Any], Any]


def augmentation(name: str, side: tuple[int, int]) -> Transform | None:
    """A transform of one image, or None where nothing is done.

    Args:
        name: one of `AUGMENTATIONS`.
        side: height and width of the model's input in pixels.

    Returns:
        A function of a uint8 or float image tensor (C, H, W), or of a PIL image. Those in `ON_ORIGINAL` take images
        of any size and bring them to `side` themselves; all others take and return images of that size.
    """
    return AUGMENTATIONS[name](side)


def _shift(side: tuple[int, int]) -> Transform:
    """Moved by up to an eighth in each direction (4 pixels of 32, as is usual for CIFAR), black outside."""
    height, width = side
    crop: Transform = v2.RandomCrop(side, padding=[max(width // 8, 1), max(height // 8, 1)])
    return crop


def _crop_flip(side: tuple[int, int]) -> Transform:
    both: Transform = v2.Compose([_shift(side), v2.RandomHorizontalFlip()])
    return both


def _imagenet(side: tuple[int, int]) -> Transform:
    both: Transform = v2.Compose([v2.RandomResizedCrop(side, antialias=True), v2.RandomHorizontalFlip()])
    return both


AUGMENTATIONS: dict[str, Callable[[tuple[int, int]], Transform | None]] = {
    "none": lambda side: None,  # noqa: ARG005 - the table's signature
    "shift": _shift,
    "crop-flip": _crop_flip,
    "imagenet": _imagenet,
}
ON_ORIGINAL = ("imagenet",)
