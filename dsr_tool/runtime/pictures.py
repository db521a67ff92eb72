"""From image files to the input of a network, pixel for pixel as torchvision prepares PIL images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from dsr_tool.errors import FileError, FormatError, UsageError, unknown_name
from dsr_tool.files import require_file
from dsr_tool.sparsity.config import ModelConfig, Preprocessing

__all__ = ["load_inputs"]

_Float32 = npt.NDArray[np.float32]
_MODES = {1: "L", 3: "RGB"}
_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
}


def load_inputs(paths: Sequence[str | Path], config: ModelConfig) -> _Float32:
    """Read pictures, or arrays that are prepared already, as one batch.

    Pictures go through the model's preprocessing; where that leaves another size than the model takes, they are
    resized to it.

    Args:
        paths: image files, and `.npy` files with one float32 input (channels, height, width) or a batch of them.
        config: what the model takes and how pictures are prepared for it.

    Returns:
        The inputs in order, shape (count, channels, height, width).

    Raises:
        FileError: a file is missing or cannot be read.
        FormatError: a file is neither a picture nor an array of numbers.
        UsageError: no paths, or an array or model that does not fit.
    """
    if not paths:
        raise UsageError("no inputs were given; name at least one picture or .npy file.")
    batches = [_load(Path(path), config) for path in paths]
    for path, batch in zip(paths, batches, strict=True):
        if batch.shape[1:] != batches[0].shape[1:]:
            raise UsageError(
                f"input {str(path)!r} has shape {batch.shape[1:]} and the first one {batches[0].shape[1:]}; "
                f"inputs of one call must have one shape."
            )
    return np.concatenate(batches)


def _load(path: Path, config: ModelConfig) -> _Float32:
    require_file(path, "input")
    if path.suffix.lower() == ".npy":
        return _array(path, config)
    return _picture(path, config)[None]


def _array(path: Path, config: ModelConfig) -> _Float32:
    """A batch from a `.npy` file."""
    try:
        with path.open("rb") as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise FormatError(f"input {str(path)!r} is not a .npy file of numbers.") from error
    except OSError as error:
        raise _unreadable(path, error) from error
    rank = len(config.input_shape) or 3
    batch = array[None] if array.ndim == rank else array
    wanted = config.input_shape or batch.shape[1:]
    if batch.dtype != np.float32 or batch.ndim != rank + 1 or batch.shape[1:] != wanted or not len(batch):
        raise UsageError(
            f"input {str(path)!r} holds {array.dtype} of shape {array.shape}; the model takes float32 of shape "
            f"{wanted}, or a batch of them."
        )
    if not np.isfinite(batch).all():
        raise UsageError(f"input {str(path)!r} holds values that are not finite; give numbers.")
    return np.asarray(batch, np.float32)


def _picture(path: Path, config: ModelConfig) -> _Float32:
    """One picture as (channels, height, width)."""
    picture = config.preprocessing
    channels = config.input_shape[0] if config.input_shape else len(picture.mean)
    if len(config.input_shape) not in (0, 3) or channels not in _MODES:
        raise UsageError(
            f"the model takes inputs of shape {config.input_shape}, which pictures do not have; give .npy files."
        )
    if picture.interpolation not in _FILTERS:
        raise unknown_name("interpolation of the preprocessing", picture.interpolation, _FILTERS)
    image = _open(path, _MODES[channels])
    image = _centre_crop(_resize_short_side(image, picture), picture.crop)
    if config.input_shape and image.size != config.input_shape[:0:-1]:
        image = image.resize((config.input_shape[2], config.input_shape[1]), _FILTERS[picture.interpolation])
    pixels = np.asarray(image, np.float32).reshape(image.height, image.width, channels)
    return _normalised(pixels.transpose(2, 0, 1) / np.float32(255), picture)


def _open(path: Path, mode: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            converted: Image.Image = image.convert(mode)
    except UnidentifiedImageError as error:
        raise FormatError(f"input {str(path)!r} is not a picture; give an image or a .npy file.") from error
    except (Image.DecompressionBombError, SyntaxError, ValueError) as error:
        raise FormatError(f"input {str(path)!r} is a damaged or oversized picture ({error}).") from error
    except OSError as error:
        raise _unreadable(path, error) from error
    return converted


def _resize_short_side(image: Image.Image, picture: Preprocessing) -> Image.Image:
    """As `torchvision.transforms.functional.resize` with one number."""
    width, height = image.size
    short, long = min(width, height), max(width, height)
    if not picture.resize or short == picture.resize:
        return image
    other = int(picture.resize * long / short)
    size = (picture.resize, other) if width <= height else (other, picture.resize)
    return image.resize(size, _FILTERS[picture.interpolation])


def _centre_crop(image: Image.Image, side: int) -> Image.Image:
    """As `torchvision.transforms.functional.center_crop`: too small pictures get a black border."""
    if not side:
        return image
    width, height = image.size
    # Outside of the picture, `crop` gives black; torchvision rounds the border down before, up behind.
    left = round((width - side) / 2.0) if width >= side else -((side - width) // 2)
    top = round((height - side) / 2.0) if height >= side else -((side - height) // 2)
    return image.crop((left, top, left + side, top + side))


def _normalised(pixels: _Float32, picture: Preprocessing) -> _Float32:
    mean, std = (np.asarray(part, np.float32).reshape(-1, 1, 1) for part in (picture.mean, picture.std))
    if len(mean) not in (1, len(pixels)) or len(std) not in (1, len(pixels)):
        raise UsageError(
            f"the preprocessing has mean {picture.mean} and std {picture.std}, but pictures of this model have "
            f"{len(pixels)} channels; give .npy files."
        )
    result: _Float32 = (pixels - mean) / std
    return result


def _unreadable(path: Path, error: OSError) -> FileError:
    return FileError(f"input {str(path)!r} cannot be read: {error.strerror or error}.")
