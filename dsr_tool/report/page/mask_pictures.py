"""Pictures of masks and of densities over time, as small PNG files in data URLs."""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from dsr_tool.sparsity.layers import matrix_shape
from dsr_tool.sparsity.mask import Mask

__all__ = ["MaskPicture", "heat_map", "mask_picture", "picture_budget", "ramp"]

_LEVELS = 16
"""Number of shades of a picture: four bits per pixel, and about as many as an eye can tell apart."""
_LIGHT, _DARK = np.array([243, 246, 249]), np.array([8, 48, 107])
"""Colors of density 0 and of the highest density, as red, green and blue."""
_ALL_PIXELS = 600_000
"""Number of pixels, and of their equivalent in text, that all layers of a page may have together."""
_PIXELS_OF_TEXT = 1_150
"""Pixels that take as many bytes as the rows of tables and the columns of charts of one layer."""
_MAX_PIXELS, _MIN_PIXELS = 40_000, 600
"""Most and fewest pixels of one picture."""
_MAX_ASPECT, _MIN_ASPECT = 4.0, 0.8
"""Largest and smallest ratio of width and height of a picture."""
_MAX_SIDE = 320
"""Largest width or height in pixels; more pixels would make the page larger but the picture no clearer."""


@dataclass(frozen=True)
class MaskPicture:
    """The picture of a mask, one pixel for each block of weights.

    Attributes:
        address: the picture as a data URL.
        width: width in pixels.
        height: height in pixels.
        rows: number of rows of the mask as a matrix, its first dimension.
        columns: number of columns of the mask as a matrix, the product of its other dimensions.
        block: largest number of rows and of columns in a block.
        darkest: density of the darkest blocks; the lightest have a density of 0.
    """

    address: str
    width: int
    height: int
    rows: int
    columns: int
    block: tuple[int, int]
    darkest: float


def picture_budget(pictures: int) -> int:
    """Returns the number of blocks per picture with which a page of 340 layers stays below a megabyte.

    Args:
        pictures: number of pictures on the page.
    """
    return max(min(_ALL_PIXELS // max(pictures, 1) - _PIXELS_OF_TEXT, _MAX_PIXELS), _MIN_PIXELS)


def mask_picture(mask: Mask, blocks: int) -> MaskPicture:
    """Returns the picture of a mask as a matrix, in at most `blocks` blocks; a dense block is dark."""
    rows, columns = matrix_shape(mask.shape)
    down, across = _blocks(rows, columns, blocks)
    density = _block_density(mask, (rows, columns), (down, across))
    darkest = float(density.max(initial=0))
    # The darkest shade is the highest density of this mask: on a scale up to 1, sparse masks would all look empty.
    levels = np.rint(density * ((_LEVELS - 1) / darkest if darkest else 0)).astype(np.uint8)
    repeat_down, repeat_across = _repeats(down, across)
    picture = levels.repeat(repeat_down, axis=0).repeat(repeat_across, axis=1)
    block = (-(-rows // down), -(-columns // across))
    return MaskPicture(_png(picture), picture.shape[1], picture.shape[0], rows, columns, block, darkest)


def heat_map(values: npt.NDArray[np.float64], low: float, high: float) -> str:
    """Returns a picture of positive values, one pixel each, on a logarithmic scale from `low` (light) to `high`."""
    # If all values are equal, their logarithms are 0 and any divisor will do.
    place = np.log(np.clip(values, low, high) / low) / (math.log(high / low) or 1.0)
    return _png(np.rint(np.nan_to_num(place) * (_LEVELS - 1)).astype(np.uint8))


def ramp() -> list[str]:
    """Returns the colors of the pictures from light to dark, in CSS notation."""
    return [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in _palette()]


def _blocks(rows: int, columns: int, most: int) -> tuple[int, int]:
    """Returns the number of rows and columns of blocks: one per weight if that is at most `most`, else fewer."""
    # Up to twice the usual side, a weight may have a pixel of its own; beyond that the picture shows averages.
    if rows * columns <= most and max(rows, columns) <= 2 * _MAX_SIDE:
        return rows, columns
    # Wide matrices get wide pictures, within the proportions of a screen.
    aspect = min(max(columns / rows, 1.0), 2.5)
    across = min(columns, _MAX_SIDE, round(math.sqrt(most * aspect)))
    down = min(rows, _MAX_SIDE, max(most // across, 1))
    return down, min(columns, _MAX_SIDE, most // down)


def _block_density(mask: Mask, shape: tuple[int, int], blocks: tuple[int, int]) -> npt.NDArray[np.float64]:
    """Returns the density of each block, shape `blocks`; sizes of blocks differ by at most one row or column."""
    # A dense mask stores no positions.
    if mask.stored is None:
        return np.ones(blocks)
    of_row, of_column = (np.arange(n, dtype=np.int64) * b // n for n, b in zip(shape, blocks, strict=True))
    # Counted from the positions, so that no dense copy of a large mask is made.
    row, column = np.divmod(mask.positions, shape[1])
    flat = np.bincount(of_row[row] * blocks[1] + of_column[column], minlength=blocks[0] * blocks[1])
    sizes = np.outer(np.bincount(of_row, minlength=blocks[0]), np.bincount(of_column, minlength=blocks[1]))
    return flat.reshape(blocks) / sizes


def _repeats(down: int, across: int) -> tuple[int, int]:
    """Returns how often to repeat each block down and across, so that a mask of few rows is not a thin line."""
    aspect = across / down
    if aspect > _MAX_ASPECT:
        return math.ceil(aspect / _MAX_ASPECT), 1
    return (1, math.ceil(_MIN_ASPECT / aspect)) if aspect < _MIN_ASPECT else (1, 1)


def _palette() -> npt.NDArray[np.int64]:
    """Returns the colors of all shades, shape (_LEVELS, 3)."""
    share = np.linspace(0, 1, _LEVELS)[:, None]
    colors: npt.NDArray[np.int64] = np.rint(_LIGHT + (_DARK - _LIGHT) * share).astype(np.int64)
    return colors


def _png(levels: npt.NDArray[np.uint8]) -> str:
    """Returns shades (height, width) as a PNG file in a data URL."""
    # A palette of 16 colors takes four bits per pixel, half of a grayscale picture.
    picture = Image.frombytes("P", levels.shape[::-1], np.ascontiguousarray(levels).tobytes())
    picture.putpalette(_palette().astype(np.uint8).tobytes())
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True, bits=4)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
