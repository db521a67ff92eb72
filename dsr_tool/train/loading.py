"""Loading: images held on the device, or pictures that are read or changed one by one in worker processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import cpu_count
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F  # noqa: N812 - its usual name

from dsr_tool.errors import DsrError
from dsr_tool.sparsity.config import Preprocessing
from dsr_tool.train.augment import Transform, on_original
from dsr_tool.train.images import InMemory, OnDisk

__all__ = ["Batch", "Held", "Key", "Pictures", "fit", "load"]

Batch = tuple[torch.Tensor, torch.Tensor]
Key = tuple[torch.Tensor, int]
"""Which images, and the seed of what is drawn for them."""
_FITTED_BYTES = 2**30
"""Images are fitted once for all when they take no more than this."""


def load(pictures: Pictures, keys: Sequence[Key], *, workers: int | None, pin: bool) -> Iterator[Batch]:
    """Batches of uint8 or float images and their labels, on the host.

    Args:
        pictures: what batches are made of.
        keys: one per batch; they carry all randomness, so that workers change nothing.
        workers: processes that load; None for none in memory and a few on disk.
        pin: whether to page-lock the batches, for a GPU to fetch.

    Raises:
        FormatError: a file is no picture, or damaged.
    """
    few = 0 if isinstance(pictures.split, InMemory) else min(4, cpu_count() or 1)
    loader: DataLoader[Any] = DataLoader(
        pictures, batch_size=None, sampler=keys, num_workers=few if workers is None else workers, pin_memory=pin
    )
    for batch in loader:
        if isinstance(batch, DsrError):
            raise batch
        yield batch


def fit(images: Any, wanted: Preprocessing) -> Any:
    """Short side to `resize`, then the centred square of `crop` pixels; for tensors of any batch, and PIL."""
    if wanted.resize:
        mode = InterpolationMode(wanted.interpolation)
        images = F.resize(images, [wanted.resize], interpolation=mode, antialias=True)
    return F.center_crop(images, [wanted.crop, wanted.crop]) if wanted.crop else images


@dataclass(frozen=True)
class Held:
    """All images of a split in one tensor, on the device where there is room for them.

    Attributes:
        images: uint8 or float32, shape (images, channels, height, width).
        labels: int64, shape (images,).
        wanted: how batches are still to be fitted to the input; None where the images are.
    """

    images: torch.Tensor
    labels: torch.Tensor
    wanted: Preprocessing | None

    @classmethod
    def on(cls, device: torch.device, split: InMemory, wanted: Preprocessing) -> Held:
        """Fit the images of a split and move them to a device."""
        images = split.images
        fitted = wanted.crop == 0 or images.shape[2:] == (wanted.crop, wanted.crop)
        bytes_fitted = images[:, :, 0, 0].numel() * wanted.crop**2 * images.element_size()
        if not fitted and bytes_fitted <= _FITTED_BYTES:
            images, fitted = torch.cat([fit(part, wanted) for part in images.split(1024)]), True
        if device.type != "cuda" or images.nbytes < torch.cuda.mem_get_info(device)[0] // 4:
            images = images.to(device)
        return cls(images, split.labels.to(device), None if fitted else wanted)

    def groups(self, order: torch.Tensor, size: int) -> Iterator[Batch]:
        """Images and labels in an order, `size` at a time."""
        for rows in order.to(self.images.device).split(size):
            images = self.images.index_select(0, rows)
            labels = self.labels.index_select(0, rows.to(self.labels.device))
            yield images if self.wanted is None else fit(images, self.wanted), labels


class Pictures(Dataset[Any]):
    """Batches of images of the size of the input; an item is a whole batch."""

    def __init__(
        self,
        split: InMemory | OnDisk,
        preprocessing: Preprocessing,
        input_shape: tuple[int, ...],
        *,
        from_original: bool,
    ) -> None:
        """Say what to make of which images.

        Args:
            split: the images.
            preprocessing: how they are fitted.
            input_shape: channels, height and width of the input.
            from_original: take a random part of each instead of fitting it (`imagenet`).
        """
        self.split = split
        self.preprocessing = preprocessing
        self.mode = "L" if input_shape[0] == 1 else "RGB"
        self.transform: Transform | None = on_original((input_shape[1], input_shape[2])) if from_original else None

    def __getitem__(self, key: Key) -> Batch | DsrError:
        indices, seed = key
        try:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)
                return torch.stack([self._one(index) for index in indices.tolist()]), self.split.labels[indices]
        except DsrError as error:
            # As a value, since an exception would leave a worker process wrapped in its traceback.
            return error

    def _one(self, index: int) -> torch.Tensor:
        on_disk = isinstance(self.split, OnDisk)
        picture = self.split.read(index, self.mode) if isinstance(self.split, OnDisk) else self.split.images[index]
        picture = fit(picture, self.preprocessing) if self.transform is None else self.transform(picture)
        tensor: torch.Tensor = F.pil_to_tensor(picture) if on_disk else picture
        return tensor
