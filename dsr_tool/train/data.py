"""Data: a data set as the input of a model, in batches whose order depends on seed and epoch alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from dsr_tool.errors import UsageError
from dsr_tool.sparsity.config import ModelConfig, Preprocessing
from dsr_tool.train.augment import ON_ORIGINAL, Moves, draw_moves
from dsr_tool.train.datasets import open_dataset
from dsr_tool.train.images import DataSet, InMemory, OnDisk
from dsr_tool.train.items import Items
from dsr_tool.train.loading import Batch, Pictures, Resident, load
from dsr_tool.train.ranks import Ranks
from dsr_tool.train.settings import TrainSettings

__all__ = ["Data", "load_data"]

_TEST_VALUES = {"cpu": 2**20, "cuda": 2**23}
"""Input values per test batch by device, unless training batches are larger: few calls that still fit a CPU's cache."""
_GROUP_VALUES = 2**24
"""Input values that are prepared at once on a GPU (64 MiB in fp32)."""


def load_data(spec: str, config: ModelConfig) -> Data:
    """Opens a data set for a model.

    Args:
        spec: value of `--data`, such as `digits` or `mnist:ROOT`.
        config: description of the model, whose input shape and number of classes must fit the data.

    Raises:
        UsageError: the data set is unknown or does not fit the model.
        FileError: the path holds no such data set.
        FormatError: a file is damaged or of the wrong kind.
    """
    if len(config.input_shape) != 3:
        raise UsageError(
            f"the model's input shape {list(config.input_shape)} is not (channels, height, width); convert it with "
            f"--input-shape C,H,W."
        )
    return Data(open_dataset(spec, config.input_shape), config)


class Data:
    """Training and test images as inputs of a model.

    Attributes:
        dataset: the data set.
        input_shape: channels, height and width of one input.
        preprocessing: how a picture becomes an input, in evaluation here and in prediction later.
    """

    def __init__(self, dataset: DataSet, config: ModelConfig) -> None:
        """Fits a data set to a model. Raises as `load_data` does."""
        if config.num_classes and dataset.num_classes > config.num_classes:
            raise UsageError(
                f"the data has {dataset.num_classes} classes, but the model has {config.num_classes} outputs; convert "
                f"the model with --num-classes {dataset.num_classes}."
            )
        if len(dataset.train.labels) < 2:
            raise UsageError("the data has 1 training image, and a batch needs 2 or more; give more.")
        self.dataset = dataset
        self.input_shape = config.input_shape
        self.preprocessing = _preprocessing(dataset.train, config)
        self._residents: dict[tuple[bool, str], Resident] = {}

    @property
    def sizes(self) -> dict[str, int]:
        """Numbers of training images, test images and classes, for the log."""
        return {
            "train_images": len(self.dataset.train.labels),
            "test_images": len(self.dataset.test.labels),
            "classes": self.dataset.num_classes,
        }

    def describe(self, config: ModelConfig) -> ModelConfig:
        """Returns the description of a model with the preprocessing and class names of this data."""
        return replace(config, preprocessing=self.preprocessing, labels=self.dataset.classes)

    def steps(self, batch_size: int) -> int:
        """Returns the number of batches per epoch; an incomplete last one is skipped unless it is the only one."""
        return max(len(self.dataset.train.labels) // batch_size, 1)

    def train_batches(self, settings: TrainSettings, epoch: int) -> Iterator[Batch]:
        """Yields inputs and labels of one epoch, on the device. Order and augmentation follow from seed and epoch."""
        # A generator per epoch, so that a resumed run need not draw the epochs before.
        random = np.random.default_rng([settings.seed, epoch])
        count = self.steps(settings.batch_size) * settings.batch_size
        order = torch.from_numpy(random.permutation(len(self.dataset.train.labels)))[:count]
        name = settings.augment or self.dataset.augment
        side = (self.input_shape[1], self.input_shape[2])
        moves = draw_moves(name, len(order), side, random)
        original = name in ON_ORIGINAL
        seed = int(random.integers(2**62)) if original or isinstance(self.dataset.train, Items) else 0
        # Drawn for the whole batch first, so that the number of processes changes no image.
        ranks = Ranks.current()
        rows, batch_size = ranks.share(torch.arange(len(order)), settings.batch_size)
        moves = None if moves is None else moves[rows]
        # Each batch takes the next seed from here on, so ranks are kept apart by more than the batches of an epoch.
        seed += len(order) * ranks.rank
        return self._inputs(_Pass(self.dataset.train, order[rows], batch_size, moves, original, seed), settings)

    def test_batches(self, settings: TrainSettings) -> Iterator[Batch]:
        """Yields inputs and labels of this rank's share of the test images, on the device, in large batches."""
        ranks = Ranks.current()
        order = torch.arange(ranks.rank, len(self.dataset.test.labels), ranks.count)
        large = min(1000, _TEST_VALUES[settings.torch_device.type] // math.prod(self.input_shape))
        return self._inputs(_Pass(self.dataset.test, order, max(settings.batch_size, large)), settings)

    def _inputs(self, shown: _Pass, settings: TrainSettings) -> Iterator[Batch]:
        device = settings.torch_device
        mean, std = (
            torch.tensor(values, device=device).reshape(1, -1, 1, 1)
            for values in (self.preprocessing.mean, self.preprocessing.std)
        )
        moves = None if shown.moves is None else shown.moves.to(device)
        start = 0
        for batch in self._images(shown, settings):
            # Only pinned memory is really copied in the background; elsewhere this is an ordinary copy.
            images, labels = (tensor.to(device, non_blocking=True) for tensor in batch)
            if moves is not None:
                images = moves[slice(start, start + len(images))](images)
            start += len(images)
            scaled = images.float() / 255 if images.dtype == torch.uint8 else images
            # Grey images have one channel; broadcasting against the model's means repeats it.
            inputs = (scaled - mean) / std
            inputs = inputs.to(memory_format=settings.input_format)
            yield from zip(inputs.split(shown.batch_size), labels.split(shown.batch_size), strict=True)

    def _images(self, shown: _Pass, settings: TrainSettings) -> Iterator[Batch]:
        """Yields images of the size of the input, in pieces of one or several batches."""
        device = settings.torch_device
        if isinstance(shown.split, InMemory) and not shown.from_original:
            # On a GPU, preparing many batches at once saves the launches of many small kernels.
            values = shown.batch_size * math.prod(self.input_shape)
            together = max(_GROUP_VALUES // values, 1) if device.type == "cuda" else 1
            return self._resident(shown.split, device).groups(shown.order, shown.batch_size * together)
        pictures = Pictures(shown.split, self.preprocessing, self.input_shape, from_original=shown.from_original)
        batches = shown.order.split(shown.batch_size)
        keys = [(batch, shown.seed + index) for index, batch in enumerate(batches)]
        return load(pictures, keys, workers=settings.workers, pin=device.type == "cuda")

    def _resident(self, split: InMemory, device: torch.device) -> Resident:
        key = (split is self.dataset.train, device.type)
        if key not in self._residents:
            self._residents[key] = Resident.on(device, split, self.preprocessing)
        return self._residents[key]


@dataclass(frozen=True)
class _Pass:
    """One pass over a split.

    Attributes:
        split: the images.
        order: image numbers in the order of the pass, int64.
        batch_size: images per batch.
        moves: augmentation of each image, in the order of the pass; None for none.
        from_original: whether augmentation cuts its part out of pictures of any size.
        seed: seed of what is drawn picture by picture.
    """

    split: InMemory | OnDisk | Items
    order: torch.Tensor
    batch_size: int
    moves: Moves | None = None
    from_original: bool = False
    seed: int = 0


def _preprocessing(split: InMemory | OnDisk | Items, config: ModelConfig) -> Preprocessing:
    """Returns how images of this data become inputs of this model; raises `UsageError` if they cannot."""
    channels, height, width = config.input_shape
    if isinstance(split, Items):
        return _of_items(split, config)
    if isinstance(split, OnDisk):
        if height != width or channels not in (1, 3):
            raise UsageError(
                f"--data images:ROOT needs a square input of 1 or 3 channels, but the model has "
                f"{[*config.input_shape]}; convert it with another --input-shape."
            )
        return _of_pictures(config)
    found, *side = split.images.shape[1:]
    if found not in (1, channels):
        raise UsageError(
            f"the data has {found} channels, but the model has {channels}; convert it with --input-shape {found},H,W."
        )
    if height != width and side != [height, width]:
        raise UsageError(
            f"images of {side} pixels do not fit an input of {[height, width]}, and only square inputs are resized to; "
            f"convert the model with --input-shape {channels},{side[0]},{side[1]}."
        )
    mean, std = (values * (channels // found) for values in _statistics(split.images))
    square = height if height == width else 0
    return Preprocessing(square, square, mean, std, "bilinear")


def _of_pictures(config: ModelConfig) -> Preprocessing:
    """Returns the preprocessing of a model, for pictures of any size and a square input."""
    channels, height, _ = config.input_shape
    own = config.preprocessing
    # The model's own if it fits its input, otherwise 256 / 224, the usual ratio for ImageNet.
    resize = own.resize if own.crop == height else round(height * 256 / 224)
    mean, std = (v if len(v) == channels else (sum(v) / len(v),) * channels for v in (own.mean, own.std))
    return replace(own, resize=resize, crop=height, mean=mean, std=std)


def _of_items(split: Items, config: ModelConfig) -> Preprocessing:
    """Returns the preprocessing of pictures in uint8, or of inputs that are normalised already: none."""
    channels, height, width = config.input_shape
    if split.shape != config.input_shape:
        raise UsageError(
            f"the tensors of {split.name} have shape {[*split.shape]}, and the model's input has "
            f"{[*config.input_shape]}; transform them to it, or convert the model with another --input-shape."
        )
    square = height if height == width else 0
    if split.dtype == torch.uint8:
        wanted = _of_pictures(config)
        return wanted if square else replace(wanted, resize=0, crop=0)
    return Preprocessing(square, square, (0.0,) * channels, (1.0,) * channels, "bilinear")


def _statistics(images: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and standard deviation per channel of values in [0, 1], rounded to four digits."""
    scale = 255 if images.dtype == torch.uint8 else 1
    sums = torch.zeros(2, images.shape[1], dtype=torch.float64)
    # In chunks, since the whole split in float32 takes four times its memory as uint8.
    for chunk in (part.float() / scale for part in images.split(256)):
        sums += torch.stack([chunk.sum((0, 2, 3)), chunk.square().sum((0, 2, 3))])
    mean, square = sums / (images.numel() / images.shape[1])
    std = (square - mean.square()).clamp(min=0).sqrt()
    # A constant channel is only centred: dividing by a deviation near 0 would blow up noise.
    std[std < 1e-3] = 1.0
    return tuple(round(x, 4) for x in mean.tolist()), tuple(round(x, 4) for x in std.tolist())
