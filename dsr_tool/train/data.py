"""Data: a data set fitted to a model's input, and its batches in an order that only seed and epoch decide."""

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
from dsr_tool.train.loading import Batch, Held, Pictures, load
from dsr_tool.train.ranks import Ranks
from dsr_tool.train.settings import TrainSettings

__all__ = ["Data", "load_data"]

_TEST_VALUES = {"cpu": 2**20, "cuda": 2**23}
"""Input values of a test batch, where the training's batch is smaller: few calls, and a CPU's cache is not outgrown."""
_GROUP_VALUES = 2**24
"""Input values that are made at once on a GPU (64 MiB in fp32)."""


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
        self._resident: dict[tuple[bool, str], Held] = {}

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
        """Inputs and labels of one epoch, on the device; order and augmentation follow from seed and epoch."""
        random = np.random.default_rng([settings.seed, epoch])
        count = self.steps(settings.batch_size) * settings.batch_size
        order = torch.from_numpy(random.permutation(len(self.dataset.train.labels)))[:count]
        name = settings.augment or self.dataset.augment
        side = (self.input_shape[1], self.input_shape[2])
        moves = draw_moves(name, len(order), side, random)
        seed = int(random.integers(2**62)) if name in ON_ORIGINAL else None
        ranks = Ranks.current()
        rows, batch_size = ranks.share(torch.arange(len(order)), settings.batch_size)
        moves = None if moves is None else moves[rows]
        seed = None if seed is None else seed + len(order) * ranks.rank
        return self._inputs(_Shown(self.dataset.train, order[rows], batch_size, moves, seed), settings)

    def test_batches(self, settings: TrainSettings) -> Iterator[Batch]:
        """Inputs and labels of all test images (this rank's share), on the device, in batches as large as suits it."""
        ranks = Ranks.current()
        order = torch.arange(ranks.rank, len(self.dataset.test.labels), ranks.count)
        most = min(1000, _TEST_VALUES[settings.torch_device.type] // math.prod(self.input_shape))
        return self._inputs(_Shown(self.dataset.test, order, max(settings.batch_size, most)), settings)

    def _inputs(self, shown: _Shown, settings: TrainSettings) -> Iterator[Batch]:
        device = settings.torch_device
        mean, std = (
            torch.tensor(values, device=device).reshape(1, -1, 1, 1)
            for values in (self.preprocessing.mean, self.preprocessing.std)
        )
        moves = None if shown.moves is None else shown.moves.to(device)
        start = 0
        for batch in self._images(shown, settings):
            images, labels = (tensor.to(device, non_blocking=True) for tensor in batch)
            if moves is not None:
                images = moves[slice(start, start + len(images))](images)
            start += len(images)
            scaled = images.float() / 255 if images.dtype == torch.uint8 else images
            # Grey images meet as many means as the model has channels, which repeats them.
            inputs = (scaled - mean) / std
            inputs = inputs.to(memory_format=settings.memory_format)
            yield from zip(inputs.split(shown.batch_size), labels.split(shown.batch_size), strict=True)

    def _images(self, shown: _Shown, settings: TrainSettings) -> Iterator[Batch]:
        """Images of the size of the input, one batch after another or several at once."""
        device = settings.torch_device
        if isinstance(shown.split, InMemory) and shown.seed is None:
            # Many batches at once spare a GPU the launches of many small kernels.
            values = shown.batch_size * math.prod(self.input_shape)
            together = max(_GROUP_VALUES // values, 1) if device.type == "cuda" else 1
            return self._held(shown.split, device).groups(shown.order, shown.batch_size * together)
        pictures = Pictures(shown.split, self.preprocessing, self.input_shape, from_original=shown.seed is not None)
        batches = shown.order.split(shown.batch_size)
        keys = [(batch, (shown.seed or 0) + index) for index, batch in enumerate(batches)]
        return load(pictures, keys, workers=settings.workers, pin=device.type == "cuda")

    def _held(self, split: InMemory, device: torch.device) -> Held:
        key = (split is self.dataset.train, device.type)
        if key not in self._resident:
            self._resident[key] = Held.on(device, split, self.preprocessing)
        return self._resident[key]


@dataclass(frozen=True)
class _Shown:
    """Which images are shown in one pass: in what order, how many at once, how moved."""

    split: InMemory | OnDisk
    order: torch.Tensor
    batch_size: int
    moves: Moves | None = None
    seed: int | None = None
    """Of what is drawn picture by picture; None where nothing is."""


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
