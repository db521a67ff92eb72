"""A data set: training and test images, in memory or on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from dsr_tool.errors import FormatError
from dsr_tool.runtime.pictures import to_mode
from dsr_tool.train.items import Items

__all__ = ["DataSet", "InMemory", "OnDisk"]


@dataclass(frozen=True)
class InMemory:
    """Images in one tensor.

    Attributes:
        images: uint8, or float32 in [0, 1]; shape (images, channels, height, width).
        labels: int64 class numbers, shape (images,).
    """

    images: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class OnDisk:
    """Images that are read when they are needed.

    Attributes:
        paths: paths of the image files.
        labels: int64 class numbers, shape (images,).
    """

    paths: Sequence[str]
    labels: torch.Tensor

    def read(self, index: int, mode: str) -> Image.Image:
        """Reads one picture and converts it to PIL's `mode`.

        Raises:
            FormatError: the file is damaged or not a picture, or has numbers without a range.
        """
        try:
            with Image.open(self.paths[index]) as image:
                return to_mode(image, mode, f"image {self.paths[index]!r}")
        except FormatError:  # a ValueError too
            raise
        # Pillow raises all of these for damaged files, depending on the format.
        except (Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
            raise FormatError(
                f"image {self.paths[index]!r} cannot be read ({error}); remove or replace the file."
            ) from error


@dataclass(frozen=True)
class DataSet:
    """Images to train on and images to test on.

    Attributes:
        train: images that the model is trained on.
        test: images that it is evaluated on.
        num_classes: number of classes: one more than the largest label.
        classes: names of the classes; empty if unknown.
        augment: name of the augmentation that suits the data.
        checksum: SHA-256 by which another split of the user's own data is noticed; empty for data that are files.
    """

    train: InMemory | OnDisk | Items
    test: InMemory | OnDisk | Items
    num_classes: int
    classes: tuple[str, ...]
    augment: str
    checksum: str = ""
