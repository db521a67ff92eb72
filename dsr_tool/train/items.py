"""`--data module:callable`: torch Datasets of the user's own, read item by item and checked as they are read."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, Subset

from converters.callables import call
from dsr_tool.errors import DsrError, FormatError, UsageError, first_line

__all__ = ["Items", "OwnData", "every_fifth", "open_items", "seeded"]


@dataclass(frozen=True)
class Items:
    """One part of a data set: items of a torch Dataset, each a tensor and a label.

    Attributes:
        source: the Dataset.
        rows: numbers of the items in it, int64, shape (images,).
        labels: int64 class numbers, shape (images,).
        name: what it is, for messages.
        shape: shape of every tensor: channels, height and width.
        dtype: `torch.uint8` for pictures, `torch.float32` for inputs that the Dataset has normalised itself.
    """

    source: Dataset[Any]
    rows: torch.Tensor
    labels: torch.Tensor
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, index: int) -> torch.Tensor:
        """Returns the tensor of an item.

        Raises:
            FormatError: the Dataset fails, or its item is of another shape or type than the others, or has another
                label than before.
        """
        row = int(self.rows[index])
        tensor, label = _read(self.source, row, self.name)
        found = (tuple(tensor.shape), tensor.dtype)
        if found != (self.shape, self.dtype):
            raise FormatError(
                f"item {row} of {self.name} has shape {list(found[0])} and type {found[1]}, and others have "
                f"{list(self.shape)} and {self.dtype}; give all the same."
            )
        if label != int(self.labels[index]):
            raise FormatError(
                f"item {row} of {self.name} has label {label}, and had {int(self.labels[index])} when the training "
                f"started or in `targets`; a label must not change."
            )
        return tensor


@dataclass(frozen=True)
class OwnData:
    """The data that a callable returned.

    Attributes:
        train: items to train on.
        test: items to test on.
        num_classes: number of classes.
        classes: names of the classes; empty if unknown.
    """

    train: Items
    test: Items
    num_classes: int
    classes: tuple[str, ...]

    @property
    def checksum(self) -> str:
        """SHA-256 of the labels of both parts, by which another order or split is noticed."""
        parts = (part.labels.numpy().tobytes() for part in (self.train, self.test))
        return hashlib.sha256(b"".join(len(part).to_bytes(8, "little") + part for part in parts)).hexdigest()


def open_items(spec: str) -> OwnData:
    """Calls a callable and reads the labels of what it returns.

    It returns two map-style Datasets, to train on and to test on, or one, of which every fifth item of each class is
    for testing; a number of classes may follow. Labels are those of the attribute `targets`, as Datasets of torchvision
    have it, or else every item is read once.

    Args:
        spec: `module:callable`, typed by the user: nothing that is read from a file is ever imported.

    Raises:
        UsageError: the callable cannot be imported, fails, or returns something else.
        FormatError: an item is no tensor and label, or its label is outside of the classes.
    """
    names = [f"the {part} of --data {spec!r}" for part in ("training data", "held-out data")]
    with seeded(0):
        parts, classes = _parse(call(spec, makes="torch Datasets"), spec)
        labels = [_labels(part, name) for part, name in zip(parts, names, strict=False)]
        first, _ = _read(parts[0], 0, names[0])
    counts = [torch.arange(len(part)) for part in labels]
    if len(parts) == 1:
        held_out = every_fifth(labels[0])
        counts = [(~held_out).nonzero().flatten(), held_out.nonzero().flatten()]
        parts, labels = [parts[0]] * 2, [labels[0][rows] for rows in counts]
    texts = _class_names(parts[0])
    number = classes or len(texts) or 1 + int(max(part.max() for part in labels if len(part)))
    for name, found in zip(names, labels, strict=True):
        if not len(found):
            raise UsageError(f"{name} has no item; give some to train on and some to test on.")
        if (wrong := found[(found < 0) | (found >= number)]).numel():
            raise FormatError(
                f"{name} has label {int(wrong[0])}, which is none of {number} classes; give labels from 0 to "
                f"{number - 1}, or return the number of classes after the Datasets."
            )
    kind = (tuple(first.shape), first.dtype)
    train, test = (
        Items(part, rows, found, name, *kind)
        for part, rows, found, name in zip(parts, counts, labels, names, strict=True)
    )
    return OwnData(train, test, number, texts if len(texts) == number else ())


def every_fifth(labels: torch.Tensor) -> torch.Tensor:
    """Returns which items are for testing: every fifth of each class, in their order, bool of shape (items,)."""
    # Classes are numbered anew, since labels that are none, such as -1 or 2^40, are refused only later.
    _, labels, counts = labels.unique(return_inverse=True, return_counts=True)
    order = labels.argsort(stable=True)
    starts = counts.cumsum(0) - counts
    number_in_class = torch.arange(1, len(labels) + 1) - starts[labels[order]]
    test = torch.zeros(len(labels), dtype=torch.bool)
    test[order] = number_in_class % 5 == 0
    return test


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds the global generators of torch, numpy and Python within, from which the user's items may draw."""
    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)


def _parse(returned: object, spec: str) -> tuple[list[Dataset[Any]], int | None]:
    """Returns the Datasets, and the number of classes if it was returned."""
    parts: list[Any] = list(returned) if isinstance(returned, (tuple, list)) else [returned]
    last: object = parts[-1] if len(parts) > 1 else None
    classes = last if isinstance(last, int) and not isinstance(last, bool) else None
    parts = parts if classes is None else parts[:-1]
    if not (1 <= len(parts) <= 2 and all(isinstance(part, Dataset) for part in parts)):
        kinds = ", ".join(type(part).__name__ for part in parts) or "nothing"
        raise UsageError(
            f"--data {spec!r} returned {kinds}; expected a torch Dataset to train on and one to test on, or one to be "
            f"split, and the number of classes or nothing after them."
        )
    if classes is not None and classes < 1:
        raise UsageError(f"--data {spec!r} returned {classes} classes; give 1 or more.")
    for part in parts:
        if isinstance(part, IterableDataset) or not hasattr(part, "__len__"):
            raise UsageError(
                f"--data {spec!r} returned {type(part).__name__}, a Dataset without a length, whose items cannot be "
                f"shuffled and resumed; give one with __getitem__ and __len__."
            )
        if not len(part):
            raise UsageError(f"--data {spec!r} returned {type(part).__name__} without items; give some.")
    return parts, classes


def _labels(items: Dataset[Any], name: str) -> torch.Tensor:
    known = _targets(items)
    count = len(items)  # type: ignore[arg-type]
    if known is None or len(known) != count:
        return torch.tensor([_read(items, row, name)[1] for row in range(count)])
    return torch.tensor([_label(value, row, name) for row, value in enumerate(known)])


def _targets(items: Dataset[Any]) -> Sequence[object] | None:
    """Returns all labels of a Dataset that lists them, as those of torchvision do; None for others."""
    if type(items) is Subset:
        every = _targets(items.dataset)
        return None if every is None else [every[row] for row in items.indices]
    targets = getattr(items, "targets", None)
    if targets is None or not hasattr(targets, "__len__") or getattr(items, "target_transform", None) is not None:
        return None
    return list(targets)


def _class_names(items: Dataset[Any]) -> tuple[str, ...]:
    if type(items) is Subset:
        return _class_names(items.dataset)
    names = getattr(items, "classes", ())
    return tuple(map(str, names)) if isinstance(names, (list, tuple)) else ()


def _read(items: Dataset[Any], row: int, name: str) -> tuple[torch.Tensor, int]:
    """Returns tensor and label of an item; floats become float32."""
    try:
        item = items[row]
    except DsrError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise FormatError(
            f"item {row} of {name} failed ({type(error).__name__}: {first_line(error)}); correct the Dataset."
        ) from error
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        raise FormatError(f"item {row} of {name} is {type(item).__name__}, expected a pair (tensor, label).")
    tensor, label = item
    if not isinstance(tensor, torch.Tensor):
        raise FormatError(
            f"item {row} of {name} has {type(tensor).__name__} in place of a tensor; give the Dataset a transform that "
            f"makes one, such as torchvision.transforms.v2.PILToTensor()."
        )
    if tensor.dtype != torch.uint8 and not tensor.is_floating_point():
        raise FormatError(
            f"item {row} of {name} has type {tensor.dtype}; give uint8 for pictures, or floats for inputs."
        )
    return tensor if tensor.dtype == torch.uint8 else tensor.float(), _label(label, row, name)


def _label(value: object, row: int, name: str) -> int:
    if isinstance(value, torch.Tensor) and value.ndim == 0 and value.dtype != torch.bool:
        value = value.item()
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool) and abs(int(value)) < 2**63:
        return int(value)
    raise FormatError(f"item {row} of {name} has label {value!r:.40}, expected a class number, a whole one from 0 on.")
