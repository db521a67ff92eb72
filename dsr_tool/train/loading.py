"""Batches of images: from a tensor on the device, or from pictures that worker processes read one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import cpu_count
from typing import TypeVar, cast

import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F  # noqa: N812 - its usual name

from dsr_tool.errors import DsrError
from dsr_tool.sparsity.config import Preprocessing
from dsr_tool.train.augment import Picture, Transform, on_original
from dsr_tool.train.images import InMemory, OnDisk
from dsr_tool.train.items import Items, seeded

__all__ = ["Batch", "Key", "Pictures", "Resident", "fit", "load"]

Batch = tuple[torch.Tensor, torch.Tensor]
"""Images or inputs, and their labels."""
Key = tuple[torch.Tensor, int]
"""Image numbers of a batch, and the seed of its random draws."""
_FITTED_BYTES = 2**30
"""Limit in bytes up to which the images of a split are resized once, instead of in every epoch."""

_Images = TypeVar("_Images", torch.Tensor, Picture)


def load(pictures: Pictures, keys: Sequence[Key], *, workers: int | None, pin: bool) -> Iterator[Batch]:
    """Yields batches of uint8 or float images and their labels, on the host.

    Args:
        pictures: the images, as batches by key.
        keys: one per batch; they carry all randomness, so the number of workers changes no bit.
        workers: number of processes that load; None for 0 if images are in memory, up to 4 if they are read one by one.
        pin: whether to page-lock the batches, so that a GPU can fetch them while it computes.

    Raises:
        FormatError: a file is damaged or not a picture.
    """
    default = 0 if isinstance(pictures.split, InMemory) else min(4, cpu_count() or 1)
    loader: DataLoader[Batch | DsrError] = DataLoader(
        pictures, batch_size=None, sampler=keys, num_workers=default if workers is None else workers, pin_memory=pin
    )
    for batch in loader:
        if isinstance(batch, DsrError):
            raise batch
        yield batch


def fit(images: _Images, wanted: Preprocessing) -> _Images:
    """Resizes the short side to `resize` pixels, then cuts out the central square of `crop` pixels."""
    if wanted.resize:
        mode = InterpolationMode(wanted.interpolation)
        images = F.resize(images, [wanted.resize], interpolation=mode, antialias=True)
    return F.center_crop(images, [wanted.crop, wanted.crop]) if wanted.crop else images


@dataclass(frozen=True)
class Resident:
    """All images of a split in one tensor, on the device if they fit there.

    Attributes:
        images: uint8 or float32 images, shape (images, channels, height, width).
        labels: int64 class numbers, shape (images,).
        wanted: preprocessing that batches still need; None if the images have the size of the input.
    """

    images: torch.Tensor
    labels: torch.Tensor
    wanted: Preprocessing | None

    @classmethod
    def on(cls, device: torch.device, split: InMemory, wanted: Preprocessing) -> Resident:
        """Resizes the images of a split if that is cheap to hold, and moves them to a device if they fit."""
        images = split.images
        fitted = wanted.crop == 0 or images.shape[2:] == (wanted.crop, wanted.crop)
        bytes_fitted = images[:, :, 0, 0].numel() * wanted.crop**2 * images.element_size()
        if not fitted and bytes_fitted <= _FITTED_BYTES:
            # In parts, since resizing needs float32 copies on the way.
            images, fitted = torch.cat([fit(part, wanted) for part in images.split(1024)]), True
        # A quarter of the free memory at most: activations and optimizer state need the rest.
        if device.type != "cuda" or images.nbytes < torch.cuda.mem_get_info(device)[0] // 4:
            images = images.to(device)
        return cls(images, split.labels.to(device), None if fitted else wanted)

    def groups(self, order: torch.Tensor, size: int) -> Iterator[Batch]:
        """Yields images and labels in an order, `size` at a time."""
        for rows in order.to(self.images.device).split(size):
            images = self.images.index_select(0, rows)
            labels = self.labels.index_select(0, rows.to(self.labels.device))
            yield images if self.wanted is None else fit(images, self.wanted), labels


class Pictures(Dataset["Batch | DsrError"]):
    """Images of the size of the input, as torch's data loader reads them; an item is a whole batch.

    Attributes:
        split: the images.
        preprocessing: how each is resized and cropped.
        mode: PIL mode in which files are read.
        transform: augmentation that replaces resizing and cropping; None for none.
    """

    def __init__(
        self,
        split: InMemory | OnDisk | Items,
        preprocessing: Preprocessing,
        input_shape: tuple[int, ...],
        *,
        from_original: bool,
    ) -> None:
        """Describes the batches.

        Args:
            split: the images.
            preprocessing: how each is resized and cropped.
            input_shape: channels, height and width of the input.
            from_original: cut a random part out of each image instead (augmentation `imagenet`).
        """
        self.split = split
        self.preprocessing = preprocessing
        self.mode = "L" if input_shape[0] == 1 else "RGB"
        self.transform: Transform | None = on_original((input_shape[1], input_shape[2])) if from_original else None

    def __getitem__(self, key: Key) -> Batch | DsrError:
        indices, seed = key
        try:
            # Transforms draw from global generators, torch's of which is without workers also that of dropout.
            with seeded(seed):
                return torch.stack([self._one(index) for index in indices.tolist()]), self.split.labels[indices]
        except DsrError as error:
            # Returned, since an exception would arrive from a worker process wrapped in its traceback.
            return error

    def _one(self, index: int) -> torch.Tensor:
        picture: Picture
        if isinstance(self.split, Items):
            picture = self.split.read(index)
            own = picture if self.transform is None else self.transform(picture)
            return cast(torch.Tensor, own)
        picture = self.split.read(index, self.mode) if isinstance(self.split, OnDisk) else self.split.images[index]
        picture = fit(picture, self.preprocessing) if self.transform is None else self.transform(picture)
        if isinstance(picture, torch.Tensor):
            return picture
        tensor: torch.Tensor = F.pil_to_tensor(picture)
        return tensor
