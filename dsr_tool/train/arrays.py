"""Images and labels from array files: numpy's .npz, and the IDX files of MNIST and Fashion-MNIST."""

from __future__ import annotations

import gzip
import zipfile
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from dsr_tool.errors import FormatError
from dsr_tool.files import require_file
from dsr_tool.train.images import InMemory

__all__ = ["read_idx", "read_npz"]

_KEYS = ("x_train", "y_train", "x_test", "y_test")


def read_npz(path: Path) -> tuple[InMemory, InMemory, tuple[str, ...]]:
    """Reads training images, test images and class names (array `classes`, may be absent) of a .npz file.

    Raises:
        FileError: no such file.
        FormatError: the file is damaged, or an array is missing or has a shape, type or values that are not allowed.
    """
    require_file(path, "array file")
    try:
        # Opened here, since numpy leaves a file open that is not an archive.
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {key: file[key] for key in (*_KEYS, "classes") if key in file}
    except (OSError, EOFError, ValueError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise FormatError(f"array file {str(path)!r} cannot be read ({error}); write it with numpy.savez.") from error
    absent = [key for key in _KEYS if key not in arrays]
    if absent:
        raise FormatError(f"array file {str(path)!r} has no {absent[0]!r}; it needs {', '.join(_KEYS)}.")
    train, test = (_checked(path, arrays[f"x_{part}"], arrays[f"y_{part}"], part) for part in ("train", "test"))
    if train.images.shape[1] != test.images.shape[1]:
        raise FormatError(
            f"array file {str(path)!r}: x_train has {train.images.shape[1]} channels and x_test has "
            f"{test.images.shape[1]}; give both the same number."
        )
    return train, test, tuple(str(name) for name in np.atleast_1d(arrays.get("classes", np.array([], str))))


def _checked(path: Path, x: npt.NDArray[np.generic], y: npt.NDArray[np.generic], part: str) -> InMemory:
    """Checks arrays and returns them as tensors; images may be NHW, NHWC or NCHW."""
    what = f"array file {str(path)!r}: x_{part} has shape {x.shape} and type {x.dtype}"
    if x.ndim == 3:  # NHW, one grey channel
        x = x[:, None]
    elif x.ndim == 4 and x.shape[-1] in (1, 3):
        # NHWC. An NCHW array that is 1 or 3 pixels wide looks the same, but nobody trains on such images.
        x = np.moveaxis(x, -1, 1)
    if x.ndim != 4 or x.shape[1] not in (1, 3) or not x.size:
        raise FormatError(f"{what}; give (N, H, W), (N, H, W, C) or (N, C, H, W) with 1 or 3 channels.")
    if x.dtype != np.uint8:
        # Written so that NaN is refused too, which compares false with everything.
        if x.dtype.kind != "f" or not (x.min() >= 0 and x.max() <= 1):
            raise FormatError(f"{what}; give uint8 in [0, 255] or floats in [0, 1].")
        x = x.astype(np.float32)
    if y.shape != (len(x),) or y.dtype.kind not in "iu" or y.min() < 0:
        raise FormatError(
            f"array file {str(path)!r}: y_{part} has shape {y.shape} and type {y.dtype}; give one class number, 0 or "
            f"more, for each of the {len(x):,} images."
        )
    return InMemory(torch.from_numpy(np.ascontiguousarray(x)), torch.from_numpy(y.astype(np.int64)))


def read_idx(folder: Path, part: str) -> InMemory:
    """Reads images and labels of one part (`train` or `t10k`), compressed with gzip or not.

    Raises:
        FileError: a file is missing.
        FormatError: a file is damaged or of another kind, or the two do not belong together.
    """
    images = _idx(folder, f"{part}-images-idx3-ubyte", 3).unsqueeze(1)
    labels = _idx(folder, f"{part}-labels-idx1-ubyte", 1).long()
    if not len(labels) or len(images) != len(labels) or int(labels.max()) > 9:
        raise FormatError(
            f"data files {part} in {str(folder)!r} do not belong together: {len(images):,} images and {len(labels):,} "
            f"labels; each image needs a label from 0 to 9, so download both again."
        )
    return InMemory(images, labels)


def _idx(folder: Path, name: str, dimensions: int) -> torch.Tensor:
    """Reads one file of unsigned bytes in the IDX format: magic, big-endian sizes, data."""
    plain, packed = folder / name, folder / f"{name}.gz"
    path = plain if plain.exists() else packed
    require_file(path, "data file")
    try:
        data = gzip.decompress(path.read_bytes()) if path == packed else path.read_bytes()
        # The magic number: two zero bytes, 8 for unsigned bytes, the number of dimensions.
        if data[:4] != bytes([0, 0, 8, dimensions]):
            raise ValueError(f"not an IDX file of {dimensions}-D bytes")
        shape = np.frombuffer(data, ">i4", dimensions, offset=4)
        # Copied, since torch must not write into Python's immutable bytes.
        return torch.from_numpy(np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape).copy())
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise FormatError(f"data file {str(path)!r} is damaged ({error}); download it again.") from error
