"""Class weights: factors on the loss of training images, for data whose classes differ in their number of images."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from dsr_tool.errors import FormatError, first_few, first_line
from dsr_tool.files import require_file
from dsr_tool.train.images import DataSet

__all__ = ["BALANCED", "NONE", "class_weights", "uneven_note"]

NONE, BALANCED = "none", "balanced"
"""Values of `--class-weights` besides the path of a file."""

_UNEVEN = 10
"""Largest ratio of the images of two classes at which nothing is said."""


def class_weights(choice: str, data: DataSet) -> tuple[float, ...] | None:
    """Returns the weight of each class, by which the loss of its training images is multiplied.

    `balanced` gives class c the weight images / (classes * images of c), so that all classes add up to the same. The
    weights of a file are multiplied by one factor. In both cases, the mean weight of the training images is 1: then
    the loss has the scale that it has without weights.

    Args:
        choice: `none`, `balanced`, or the path of a CSV file with columns `class` and `weight`; see `_read`.
        data: the data; only its training images are counted.

    Returns:
        Weights in the order of the classes; 0 for a class without training images. None for `none`.

    Raises:
        FileError: the file does not exist.
        FormatError: the file is no such table, or does not give each class one positive weight; all faults are listed.
    """
    if choice == NONE:
        return None
    counts = _counts(data)
    if choice == BALANCED:
        present = sum(map(bool, counts))
        return tuple(sum(counts) / (present * count) if count else 0.0 for count in counts)
    raw = _read(Path(choice), data)
    scale = sum(counts) / math.fsum(weight * count for weight, count in zip(raw, counts, strict=True))
    return tuple(weight * scale if count else 0.0 for weight, count in zip(raw, counts, strict=True))


def uneven_note(data: DataSet) -> str:
    """Returns a line for data with a class that has over ten times the training images of another; else nothing."""
    counts = _counts(data)
    present = [index for index, count in enumerate(counts) if count]
    most, least = max(present, key=counts.__getitem__), min(present, key=counts.__getitem__)
    if counts[most] <= _UNEVEN * counts[least]:
        return ""
    (large, small), (many, few) = (_named(data, (most, least)), (counts[most], counts[least]))
    return (
        f"the classes are uneven: {many:,} training images of {large}, {few:,} of {small}; --class-weights balanced "
        f"makes them count alike"
    )


def _counts(data: DataSet) -> list[int]:
    counts: list[int] = torch.bincount(data.train.labels, minlength=data.num_classes).tolist()
    return counts


def _named(data: DataSet, classes: Sequence[int]) -> list[str]:
    return [repr(data.classes[index]) if data.classes else f"class {index}" for index in classes]


def _read(path: Path, data: DataSet) -> list[float]:
    """Returns the weights of a file in the order of the classes.

    A class is named by its name or by its number from 0: by numbers if one of the cells is no name of the data.
    """
    rows = _rows(path)
    names = {name: index for index, name in enumerate(data.classes)}
    if not all(name in names for name, _ in rows):
        names = {str(index): index for index in range(data.num_classes)}
    given = Counter(name for name, _ in rows)
    weights = {names[name]: _number(text) for name, text in rows if name in names}
    missing = [index for index in range(data.num_classes) if index not in weights]
    faults = [
        _fault("unknown classes", [name for name in given if name not in names]),
        _fault("repeated classes", [name for name, times in given.items() if times > 1]),
        _fault("missing classes", [data.classes[index] if data.classes else str(index) for index in missing]),
        _fault("weights that are no positive numbers", [text for _, text in rows if _number(text) <= 0]),
    ]
    if any(faults):
        raise FormatError(
            f"--class-weights file {str(path)!r} has {'; '.join(filter(None, faults))}. Give each of the "
            f"{data.num_classes} classes one line, by name or by number from 0, with a positive weight."
        )
    return [weights[index] for index in range(data.num_classes)]


def _rows(path: Path) -> list[tuple[str, str]]:
    """Returns the two cells of each line below the header."""
    require_file(path, "--class-weights file")
    try:
        # utf-8-sig, because spreadsheets begin a file with a byte order mark.
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restval="")
            rows = [(line["class"].strip(), line["weight"].strip()) for line in reader]
    except KeyError as error:
        raise FormatError(
            f"--class-weights file {str(path)!r} has no column {error}; begin it with the line class,weight."
        ) from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FormatError(
            f"--class-weights file {str(path)!r} cannot be read as a CSV file in UTF-8 ({first_line(error)}); write "
            f"it anew."
        ) from error
    if not rows:
        raise FormatError(f"--class-weights file {str(path)!r} has no lines below its header; give one for each class.")
    return rows


def _number(text: str) -> float:
    """Returns a weight; 0, which no weight may be, for a text that is no finite number."""
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if math.isfinite(value) else 0.0


def _fault(kind: str, found: Sequence[str]) -> str:
    return f"{kind}: {first_few(list(map(repr, found)), counted=True)}" if found else ""
