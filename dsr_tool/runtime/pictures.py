"""Reads a picture as the input of a network, pixel for pixel as torchvision prepares PIL images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from dsr_tool.errors import FormatError, UsageError, unknown_name
from dsr_tool.sparsity.config import ModelConfig, Preprocessing

__all__ = ["read_picture", "to_mode"]

_Float32 = npt.NDArray[np.float32]
_MODES = {1: "L", 3: "RGB"}
"""Number of channels -> PIL mode that a picture is converted to."""
_UNBOUNDED = {"F": "floats", "I": "32-bit or signed integers"}
"""PIL modes whose numbers have no range -> what they hold."""
_BITS_PER_SAMPLE = 258
"""Tag of TIFF files."""
_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
}


def read_picture(path: Path, config: ModelConfig) -> _Float32:
    """Returns one picture, resized, cropped and normalized by the model's preprocessing.

    Args:
        path: the image file.
        config: input shape and preprocessing of the model.

    Returns:
        The pixels, shape (channels, height, width).

    Raises:
        FormatError: the file is no picture, or a damaged one.
        OSError: the file cannot be read.
        UsageError: pictures do not fit the model.
    """
    preprocessing = config.preprocessing
    channels = config.input_shape[0] if config.input_shape else len(preprocessing.mean)
    if len(config.input_shape) not in (0, 3) or channels not in _MODES:
        raise UsageError(
            f"the model expects inputs of shape {config.input_shape}, which pictures do not have; give .npy files."
        )
    if preprocessing.interpolation not in _FILTERS:
        raise unknown_name("interpolation of the preprocessing", preprocessing.interpolation, _FILTERS)
    image = _open(path, _MODES[channels])
    image = _center_crop(_resize_short_side(image, preprocessing), preprocessing.crop)
    # PIL gives (width, height), and shapes are (channels, height, width).
    if config.input_shape and image.size != config.input_shape[:0:-1]:
        image = image.resize((config.input_shape[2], config.input_shape[1]), _FILTERS[preprocessing.interpolation])
    pixels = np.asarray(image, np.float32).reshape(image.height, image.width, channels)
    return _normalize(pixels.transpose(2, 0, 1) / np.float32(255), preprocessing)


def _open(path: Path, mode: str) -> Image.Image:
    """Returns a picture converted to a PIL mode."""
    try:
        with Image.open(path) as image:
            converted = to_mode(image, mode, f"input {str(path)!r}")
    except FormatError:  # a ValueError too
        raise
    except UnidentifiedImageError as error:
        raise FormatError(f"input {str(path)!r} is not a picture; give an image or a .npy file.") from error
    except (Image.DecompressionBombError, SyntaxError, ValueError) as error:
        # PIL raises SyntaxError for damaged PNG files.
        raise FormatError(
            f"input {str(path)!r} is a damaged or oversized picture ({error}); give another copy of it."
        ) from error
    return converted


def to_mode(image: Image.Image, mode: str, name: str) -> Image.Image:
    """Converts a picture like `Image.convert`, but scales greys of more than 8 bits, which Pillow cuts off at 255.

    Transparency is dropped, whatever colour lies below it, and of several frames the first is taken: as torchvision
    has it.

    Args:
        image: an opened picture of any mode.
        mode: `L` or `RGB`.
        name: what the picture is, and its path, for messages.

    Raises:
        FormatError: the picture has numbers without a range.
        ValueError: Pillow cannot convert it.
    """
    if white := _white(image):
        # Rounded, so that a grey of 8 bits that was widened to 16 comes back as it was.
        greys = (np.asarray(image, np.int64).clip(0, white) * 255 + white // 2) // white
        image = Image.fromarray(greys.astype(np.uint8))
    elif image.mode in _UNBOUNDED:
        raise FormatError(
            f"{name} holds {_UNBOUNDED[image.mode]}, for which black and white are not defined; save it with 8 or 16 "
            f"bits per value."
        )
    elif image.mode == "La":  # premultiplied, which has a single conversion
        image = image.convert("LA")
    elif image.mode == "LAB" and mode == "L":
        image = image.convert("RGB")
    converted: Image.Image = image.convert(mode)
    return converted


def _white(image: Image.Image) -> int:
    """Returns the largest value of a grey picture of more than 8 bits; 0 for all others."""
    # Pillow gives greys of 12 bits as they are, and all other depths as 16. It widens some formats to 32 bits.
    if image.mode.startswith("I;16"):
        tags = getattr(image, "tag_v2", {})
        return 4095 if tags.get(_BITS_PER_SAMPLE) == (12,) else 65535
    return 65535 if image.mode == "I" and image.format in ("PNG", "PPM") else 0


def _resize_short_side(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """Resizes like `torchvision.transforms.functional.resize` with one number, the length of the short side."""
    width, height = image.size
    short, long = min(width, height), max(width, height)
    if not preprocessing.resize or short == preprocessing.resize:
        return image
    other = int(preprocessing.resize * long / short)
    size = (preprocessing.resize, other) if width <= height else (other, preprocessing.resize)
    return image.resize(size, _FILTERS[preprocessing.interpolation])


def _center_crop(image: Image.Image, side: int) -> Image.Image:
    """Crops like `torchvision.transforms.functional.center_crop`; pictures that are too small get a black border."""
    if not side:
        return image
    width, height = image.size
    # Outside of the picture, `crop` gives black. Python rounds halves to even, as torchvision does; a border is rounded
    # down on the left and top, and up on the right and bottom.
    left = round((width - side) / 2.0) if width >= side else -((side - width) // 2)
    top = round((height - side) / 2.0) if height >= side else -((side - height) // 2)
    return image.crop((left, top, left + side, top + side))


def _normalize(pixels: _Float32, preprocessing: Preprocessing) -> _Float32:
    """Subtracts the mean and divides by the standard deviation of each channel."""
    mean, std = (np.asarray(part, np.float32).reshape(-1, 1, 1) for part in (preprocessing.mean, preprocessing.std))
    if len(mean) not in (1, len(pixels)) or len(std) not in (1, len(pixels)):
        raise UsageError(
            f"the preprocessing has mean {preprocessing.mean} and std {preprocessing.std}, but pictures of this model "
            f"have {len(pixels)} channels; give .npy files."
        )
    result: _Float32 = (pixels - mean) / std
    return result
