"""The data sets that `--data` can name, as they are before they are fitted to a model."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torchvision import datasets as tv

from converters.callables import is_callable_name
from dsr_tool.errors import FileError, FormatError, UsageError, closest, unknown_name
from dsr_tool.runtime.picture_folder import class_folders
from dsr_tool.train.arrays import read_idx, read_npz
from dsr_tool.train.images import DataSet, InMemory, OnDisk
from dsr_tool.train.items import every_fifth, open_items

__all__ = ["DATASETS", "data_name", "names_code", "open_dataset"]

_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_DIGITS = tuple(str(digit) for digit in range(10))


def open_dataset(spec: str, input_shape: tuple[int, ...]) -> DataSet:
    """Opens the data set that `--data` names.

    Args:
        spec: a name in `DATASETS`, followed by a colon and its path or size if it has one; or `module:callable`, see
            `items.open_items`.
        input_shape: channels, height and width of random images.

    Raises:
        UsageError: no such data set, or the part after the colon is missing or not allowed.
        FileError: the path holds no such data set.
        FormatError: a file is damaged or of the wrong kind.
    """
    name, _, rest = spec.partition(":")
    if names_code(spec):
        return _own(spec)
    if name not in DATASETS:
        raise unknown_name("--data", name, DATASETS)
    needs, open_it = DATASETS[name]
    if bool(rest) != bool(needs):
        raise UsageError(f"--data {spec!r} is not allowed; write it as {name}{':' if needs else ''}{needs}.")
    if needs in ("ROOT", "FILE.npz"):
        return open_it(Path(rest))
    return _fake(rest, input_shape) if needs else open_it()


def names_code(spec: str) -> bool:
    """Returns whether a value of `--data` is `module:callable`, which only a user may name, not a file."""
    return spec.partition(":")[0] not in DATASETS and is_callable_name(spec)


def data_name(spec: str) -> str:
    """Returns what a value of `--data` names, without the path of its files, which differs between machines."""
    return spec if names_code(spec) else spec.partition(":")[0]


def _own(spec: str) -> DataSet:
    module = spec.partition(":")[0]
    close, first = closest(module, DATASETS), module.partition(".")[0]
    here = Path(first, "__init__.py").exists() or Path(*module.split(".")).with_suffix(".py").exists()
    if close and not here and importlib.util.find_spec(first) is None:
        raise unknown_name("--data", module, DATASETS)  # mistyped, more likely than a module that is missing
    data = open_items(spec)
    return DataSet(data.train, data.test, data.num_classes, data.classes, augment="none", checksum=data.checksum)


def _digits() -> DataSet:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UsageError(
            "--data 'digits' needs scikit-learn, which is not installed; run: pip install 'dsr-tool[digits]'"
        ) from error
    digits = load_digits()
    # Pixels are 0 to 16.
    images = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    test = every_fifth(labels)  # stratified, and the same on every machine
    return DataSet(
        InMemory(images[~test], labels[~test]), InMemory(images[test], labels[test]), 10, _DIGITS, augment="shift"
    )


def _mnist(root: Path) -> DataSet:
    return _idx_files(root, "MNIST", _DIGITS, augment="shift")


def _fashion_mnist(root: Path) -> DataSet:
    return _idx_files(root, "FashionMNIST", _FASHION, augment="crop-flip")


def _idx_files(root: Path, folder: str, classes: tuple[str, ...], augment: str) -> DataSet:
    """Reads the four original files, gzipped or not, from torchvision's folder for them or from ROOT itself."""
    folders = [root / folder / "raw", root / "raw", root]
    raw = next((place for place in folders if list(place.glob("train-images-idx3-ubyte*"))), None)
    if raw is None:
        raise FileError(
            f"{folder} folder {str(root)!r} has no train-images-idx3-ubyte(.gz), neither directly nor in {folder}/raw; "
            f"download the four files from the site of the data set."
        )
    train, test = (read_idx(raw, part) for part in ("train", "t10k"))
    return DataSet(train, test, 10, classes, augment)


def _cifar(root: Path, kind: type[tv.CIFAR10]) -> DataSet:
    try:
        # torchvision checks the files' MD5 sums, and raises RuntimeError for any that is missing or damaged.
        parts = [kind(root, train=train, download=False) for train in (True, False)]
    except RuntimeError as error:
        raise FileError(
            f"{kind.__name__} folder {str(root)!r} does not hold the official {kind.base_folder}, complete and "
            f"unpacked; download it from the site of the data set, or give its images as arrays:FILE.npz."
        ) from error
    train, test = (
        InMemory(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in parts
    )
    return DataSet(train, test, len(parts[0].classes), tuple(parts[0].classes), augment="crop-flip")


def _cifar10(root: Path) -> DataSet:
    return _cifar(root, tv.CIFAR10)


def _cifar100(root: Path) -> DataSet:
    return _cifar(root, tv.CIFAR100)


def _images(root: Path) -> DataSet:
    train, test = (class_folders(root / part, "images folder") for part in ("train", "val"))
    if train.keys() != test.keys():
        odd = sorted(train.keys() ^ test.keys())[0]
        raise FormatError(
            f"images folder {str(root)!r}: class {odd!r} is only in one of train/ and val/; give it to both."
        )
    parts = [
        OnDisk(
            [str(path) for paths in part.values() for path in paths],
            torch.tensor([label for label, paths in enumerate(part.values()) for _ in paths]),
        )
        for part in (train, test)
    ]
    return DataSet(parts[0], parts[1], len(train), tuple(train), augment="imagenet")


def _arrays(path: Path) -> DataSet:
    train, test, classes = read_npz(path)
    count = int(max(train.labels.max(), test.labels.max())) + 1
    # Names for another number of classes would be attached to the wrong ones.
    return DataSet(train, test, count, classes if len(classes) == count else (), augment="none")


def _fake(rest: str, input_shape: tuple[int, ...]) -> DataSet:
    """Returns random images of the model's input shape, always the same. Nothing can be learnt from them."""
    if not rest.isdecimal() or not 2 <= int(rest) <= 10**7:
        raise UsageError(f"--data 'fake:{rest}' is not allowed; give a number of training images from 2 to 10,000,000.")
    generator = torch.Generator().manual_seed(0)
    train, test = (
        InMemory(
            torch.randint(0, 256, (count, *input_shape), dtype=torch.uint8, generator=generator),
            torch.randint(0, 10, (count,), generator=generator),
        )
        for count in (int(rest), max(int(rest) // 5, 1))
    )
    return DataSet(train, test, 10, (), augment="none")


DATASETS: dict[str, tuple[str, Callable[..., DataSet]]] = {
    "digits": ("", _digits),
    "mnist": ("ROOT", _mnist),
    "fashion-mnist": ("ROOT", _fashion_mnist),
    "cifar10": ("ROOT", _cifar10),
    "cifar100": ("ROOT", _cifar100),
    "images": ("ROOT", _images),
    "arrays": ("FILE.npz", _arrays),
    "fake": ("N", _fake),
}
"""Text after the colon that each data set needs (empty for none), and the function that opens it."""
