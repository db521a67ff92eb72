"""Pictures of masks and of densities over time: small PNG files in data addresses."""

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
"""Shades of a picture: what four bits a pixel hold, and about what an eye tells apart."""
_LIGHT, _DARK = np.array([243, 246, 249]), np.array([8, 48, 107])
_ALL_PIXELS, _PIXELS_OF_TEXT, _MOST_PIXELS, _FEWEST_PIXELS = 600_000, 1_150, 40_000, 600
_WIDEST, _TALLEST = 4.0, 0.8
_SHARPEST = 320  # pixels across; more only makes the page larger


@dataclass(frozen=True)
class MaskPicture:
    """A mask, shrunk.

    Attributes:
        address: the picture as a data address.
        width, height: of the picture in pixels.
        rows, columns: of the mask as a matrix: first dimension by all others.
        block: rows and columns that one block of the picture stands for, at most.
        darkest: density of the darkest blocks; the lightest have none.
    """

    address: str
    width: int
    height: int
    rows: int
    columns: int
    block: tuple[int, int]
    darkest: float


def picture_budget(pictures: int) -> int:
    """Blocks that each of so many pictures may have, so that a page of 340 layers stays below a megabyte.

    Rows of tables and columns of charts take as much room for each layer as a small picture.
    """
    return max(min(_ALL_PIXELS // max(pictures, 1) - _PIXELS_OF_TEXT, _MOST_PIXELS), _FEWEST_PIXELS)


def mask_picture(mask: Mask, blocks: int) -> MaskPicture:
    """The mask as a matrix, in at most so many blocks, each as dark as it is dense."""
    rows, columns = matrix_shape(mask.shape)
    down, across = _blocks(rows, columns, blocks)
    density = _block_density(mask, (rows, columns), (down, across))
    darkest = float(density.max(initial=0))
    levels = np.rint(density * ((_LEVELS - 1) / darkest if darkest else 0)).astype(np.uint8)
    repeat_down, repeat_across = _repeats(down, across)
    picture = levels.repeat(repeat_down, axis=0).repeat(repeat_across, axis=1)
    block = (-(-rows // down), -(-columns // across))
    return MaskPicture(_png(picture), picture.shape[1], picture.shape[0], rows, columns, block, darkest)


def heat_map(values: npt.NDArray[np.float64], low: float, high: float) -> str:
    """A picture of positive values on a logarithmic scale from `low` (light) to `high` (dark), one pixel each."""
    place = np.log(np.clip(values, low, high) / low) / (math.log(high / low) or 1.0)
    return _png(np.rint(np.nan_to_num(place) * (_LEVELS - 1)).astype(np.uint8))


def ramp() -> list[str]:
    """The colours of the pictures from light to dark, as CSS has them."""
    return [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in _palette()]


def _blocks(rows: int, columns: int, most: int) -> tuple[int, int]:
    """Rows and columns of blocks: each weight its own where they fit, else about as many as the picture is wide."""
    if rows * columns <= most and max(rows, columns) <= 2 * _SHARPEST:
        return rows, columns
    aspect = min(max(columns / rows, 1.0), 2.5)
    across = min(columns, _SHARPEST, round(math.sqrt(most * aspect)))
    down = min(rows, _SHARPEST, max(most // across, 1))
    return down, min(columns, _SHARPEST, most // down)


def _block_density(mask: Mask, shape: tuple[int, int], blocks: tuple[int, int]) -> npt.NDArray[np.float64]:
    """Fraction of active entries by block, shape `blocks`; blocks differ by one row or column at most."""
    if mask.stored is None:
        return np.ones(blocks)
    of_row, of_column = (np.arange(n, dtype=np.int64) * b // n for n, b in zip(shape, blocks, strict=True))
    row, column = np.divmod(mask.positions, shape[1])
    flat = np.bincount(of_row[row] * blocks[1] + of_column[column], minlength=blocks[0] * blocks[1])
    sizes = np.outer(np.bincount(of_row, minlength=blocks[0]), np.bincount(of_column, minlength=blocks[1]))
    return flat.reshape(blocks) / sizes


def _repeats(down: int, across: int) -> tuple[int, int]:
    """How often each block is repeated, so that pictures of a few rows or columns are not slivers."""
    aspect = across / down
    if aspect > _WIDEST:
        return math.ceil(aspect / _WIDEST), 1
    return (1, math.ceil(_TALLEST / aspect)) if aspect < _TALLEST else (1, 1)


def _palette() -> npt.NDArray[np.int64]:
    share = np.linspace(0, 1, _LEVELS)[:, None]
    colours: npt.NDArray[np.int64] = np.rint(_LIGHT + (_DARK - _LIGHT) * share).astype(np.int64)
    return colours


def _png(levels: npt.NDArray[np.uint8]) -> str:
    picture = Image.frombytes("P", levels.shape[::-1], np.ascontiguousarray(levels).tobytes())
    picture.putpalette(_palette().astype(np.uint8).tobytes())
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True, bits=4)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
