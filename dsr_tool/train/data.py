"""Data: a data set fitted to a model's input, and its batches in an order that only seed and epoch decide."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from os import cpu_count
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F  # noqa: N812 - its usual name

from dsr_tool.core.config import ModelConfig, Preprocessing
from dsr_tool.errors import DsrError, UsageError
from dsr_tool.train.augment import ON_ORIGINAL, Transform, augmentation
from dsr_tool.train.datasets import open_dataset
from dsr_tool.train.images import DataSet, InMemory, OnDisk
from dsr_tool.train.settings import TrainSettings

__all__ = ["Data", "load_data"]

Batch = tuple[torch.Tensor, torch.Tensor]
Key = tuple[torch.Tensor, int]


def load_data(spec: str, config: ModelConfig) -> Data:
    """Open a data set for a model.

    Args:
        spec: what follows `--data` on the command line, such as `digits` or `mnist:ROOT`.
        config: the model's description; its input shape and number of classes must be able to take the data.

    Raises:
        UsageError: unknown data set, or one that does not fit the model.
        FileError: nothing there.
        FormatError: what is there is damaged or of the wrong kind.
    """
    if len(config.input_shape) != 3:
        raise UsageError(
            f"the model's input shape {list(config.input_shape)} is not that of an image; convert it with "
            f"input_shape=(channels, height, width)."
        )
    return Data(open_dataset(spec, config.input_shape), config)


class Data:
    """Training and test images as a model's input.

    Attributes:
        dataset: what was opened.
        input_shape: channels, height and width of one input.
        preprocessing: how a picture becomes an input, the same in evaluation here and in prediction later.
    """

    def __init__(self, dataset: DataSet, config: ModelConfig) -> None:
        """Fit a data set to a model; see `load_data` for what is raised."""
        if config.num_classes and dataset.num_classes > config.num_classes:
            raise UsageError(
                f"the data has {dataset.num_classes} classes but the model has {config.num_classes} outputs; convert "
                f"the model with --num-classes {dataset.num_classes}."
            )
        if len(dataset.train.labels) < 2:
            raise UsageError("the data has 1 training image; at least 2 are needed.")
        self.dataset = dataset
        self.input_shape = config.input_shape
        self.preprocessing = _preprocessing(dataset.train, config)

    @property
    def sizes(self) -> dict[str, int]:
        """Numbers of images and classes, for the record."""
        return {
            "train_images": len(self.dataset.train.labels),
            "test_images": len(self.dataset.test.labels),
            "classes": self.dataset.num_classes,
        }

    def describe(self, config: ModelConfig) -> ModelConfig:
        """The description of a model trained on this data: with its preprocessing and class names."""
        return replace(config, preprocessing=self.preprocessing, labels=self.dataset.classes)

    def steps(self, batch_size: int) -> int:
        """Batches of one epoch; an incomplete last one is left out unless it is the only one."""
        return max(len(self.dataset.train.labels) // batch_size, 1)

    def train_batches(self, settings: TrainSettings, epoch: int) -> Iterator[Batch]:
        """Inputs and labels of one epoch, on the device."""
        count = len(self.dataset.train.labels)
        random = np.random.default_rng([settings.seed, epoch])
        order = torch.from_numpy(random.permutation(count))[: self.steps(settings.batch_size) * settings.batch_size]
        batches = order.split(settings.batch_size)
        keys = list(zip(batches, random.integers(2**62, size=len(batches)).tolist(), strict=True))
        name = settings.augment or self.dataset.augment
        fitted = _Fitted(self.dataset.train, self.preprocessing, self.input_shape, name)
        return self._load(fitted, keys, settings)

    def test_batches(self, settings: TrainSettings) -> Iterator[Batch]:
        """Inputs and labels of all test images, on the device."""
        indices = torch.arange(len(self.dataset.test.labels)).split(settings.batch_size)
        fitted = _Fitted(self.dataset.test, self.preprocessing, self.input_shape, "none")
        return self._load(fitted, [(batch, 0) for batch in indices], settings)

    def _load(self, fitted: _Fitted, keys: Sequence[Key], settings: TrainSettings) -> Iterator[Batch]:
        device = settings.torch_device
        few = 0 if isinstance(fitted.split, InMemory) else min(4, cpu_count() or 1)
        workers = few if settings.workers is None else settings.workers
        # Whole batches are the loader's items: their keys carry all randomness, so that workers change nothing.
        loader: DataLoader[Any] = DataLoader(
            fitted,
            batch_size=None,
            sampler=keys,
            num_workers=workers,
            pin_memory=device.type == "cuda",
        )
        mean, std = (
            torch.tensor(values, device=device).reshape(1, -1, 1, 1)
            for values in (self.preprocessing.mean, self.preprocessing.std)
        )
        for batch in loader:
            if isinstance(batch, DsrError):
                raise batch
            images, labels = (tensor.to(device, non_blocking=True) for tensor in batch)
            scaled = images.float() / 255 if images.dtype == torch.uint8 else images
            # Grey images meet as many means as the model has channels, which repeats them.
            inputs = (scaled - mean) / std
            if device.type == "cuda":
                inputs = inputs.contiguous(memory_format=torch.channels_last)
            yield inputs, labels


class _Fitted(Dataset[Any]):
    """Batches of images, brought to the size of the input and augmented; an item is a whole batch."""

    def __init__(
        self, split: InMemory | OnDisk, preprocessing: Preprocessing, input_shape: tuple[int, ...], augment: str
    ) -> None:
        self.split = split
        self.preprocessing = preprocessing
        self.mode = "L" if input_shape[0] == 1 else "RGB"
        self.augment: Transform | None = augmentation(augment, (input_shape[1], input_shape[2]))
        self.on_original = augment in ON_ORIGINAL

    def __getitem__(self, key: Key) -> Batch | DsrError:
        indices, seed = key
        try:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)
                return self._images(indices), self.split.labels[indices]
        except DsrError as error:
            # As a value, since an exception would leave a worker process wrapped in its traceback.
            return error

    def _images(self, indices: torch.Tensor) -> torch.Tensor:
        if isinstance(self.split, OnDisk):
            pictures = (self.split.read(index, self.mode) for index in indices.tolist())
            return torch.stack([F.pil_to_tensor(self._one(picture)) for picture in pictures])
        images = self.split.images[indices]
        if not self.on_original:
            images = self._fit(images)
        return images if self.augment is None else torch.stack([self.augment(image) for image in images])

    def _one(self, picture: Any) -> Any:
        fitted = picture if self.on_original else self._fit(picture)
        return fitted if self.augment is None else self.augment(fitted)

    def _fit(self, images: Any) -> Any:
        """Short side to `resize`, then the centred square of `crop` pixels; for tensors of any batch, and PIL."""
        wanted = self.preprocessing
        if wanted.resize:
            mode = InterpolationMode(wanted.interpolation)
            images = F.resize(images, [wanted.resize], interpolation=mode, antialias=True)
        return F.center_crop(images, [wanted.crop, wanted.crop]) if wanted.crop else images


def _preprocessing(split: InMemory | OnDisk, config: ModelConfig) -> Preprocessing:
    """How images of this data become inputs of this model."""
    channels, height, width = config.input_shape
    own = config.preprocessing
    if isinstance(split, OnDisk):
        if height != width or channels not in (1, 3):
            raise UsageError(
                f"images:ROOT needs a square input of 1 or 3 channels; the model's is {[*config.input_shape]}."
            )
        # The model's own, where it fits; otherwise ImageNet's usual 256 / 224 in proportion.
        resize = own.resize if own.crop == height else round(height * 256 / 224)
        mean, std = (v if len(v) == channels else (sum(v) / len(v),) * channels for v in (own.mean, own.std))
        return replace(own, resize=resize, crop=height, mean=mean, std=std)
    found, *side = split.images.shape[1:]
    if found not in (1, channels):
        raise UsageError(f"the data has {found} channels but the model takes {channels}; they must agree.")
    if height != width and side != [height, width]:
        raise UsageError(f"images of {side} pixels do not fit an input of {[height, width]}; only squares are resized.")
    mean, std = (values * (channels // found) for values in _statistics(split.images))
    square = height if height == width else 0
    return Preprocessing(square, square, mean, std, "bilinear")


def _statistics(images: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of values in [0, 1], to four digits."""
    scale = 255 if images.dtype == torch.uint8 else 1
    sums = torch.zeros(2, images.shape[1], dtype=torch.float64)
    for chunk in (part.float() / scale for part in images.split(256)):
        sums += torch.stack([chunk.sum((0, 2, 3)), chunk.square().sum((0, 2, 3))])
    mean, square = sums / (images.numel() / images.shape[1])
    std = (square - mean.square()).clamp(min=0).sqrt()
    # A channel that never varies is left as it is.
    std[std < 1e-3] = 1.0
    return tuple(round(x, 4) for x in mean.tolist()), tuple(round(x, 4) for x in std.tolist())
