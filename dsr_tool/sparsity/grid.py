"""Grid tensors: weights in few bits, a whole number each and one scale for each output channel.

A grid of b bits is symmetric: codes lie in [-q, q] with q = 2^(b-1) - 1, and code c of an output channel with scale s
has the value c · s. Zero is a code, so inactive entries stay zero and masks stay as they are.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import numpy.typing as npt

from dsr_tool.sparsity.layers import matrix_shape
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor

__all__ = [
    "LARGEST_SCALE",
    "SCALE_BITS",
    "SMALLEST_SCALE",
    "Codes",
    "Floats",
    "GridTensor",
    "grid_fault",
    "largest_code",
    "row_counts",
    "shortened",
]

Codes = npt.NDArray[np.int8]
Floats = npt.NDArray[np.float32]

SCALE_BITS = 11
"""Significant bits of a scale that is chosen here, as in float16: with the 7 bits of a code, a product is exact in
float32, so a grid can be found again in values that were stored as floats."""

SMALLEST_SCALE, LARGEST_SCALE = np.finfo(np.float32).smallest_normal, np.finfo(np.float32).max / np.float32(127)
"""Scales other than 0 that every reader takes: normal numbers of which the largest code of 8 bits does not overflow."""


class GridTensor(SparseTensor):
    """A parameter as its mask, a code for each active entry, and a scale for each output channel.

    It is a `SparseTensor` of float32 values, which are computed when they are asked for.

    Attributes:
        mask: active entries.
        codes: int8, shape (mask.active,), in [-127, 127], in the order of the positions.
        scales: float32, shape (rows,), one for each row of the parameter as a matrix (`matrix_shape`); not negative.
    """

    codes: Codes
    scales: Floats

    def __init__(self, mask: Mask, codes: Codes, scales: Floats) -> None:
        """Holds the parts; nothing is copied."""
        # The class is frozen, as its base is; `values` is computed, so the base's own __init__ does not run.
        for name, part in (("mask", mask), ("codes", codes), ("scales", scales)):
            object.__setattr__(self, name, part)

    @property
    def values(self) -> Floats:
        """The values, float32, shape (mask.active,): each code times the scale of its output channel."""
        return self.codes.astype(np.float32) * np.repeat(self.scales, row_counts(self.mask))

    def scaled(self, factors: npt.NDArray[np.floating[Any]]) -> GridTensor:
        """Returns the tensor with each output channel times a factor: the same codes on other scales.

        Args:
            factors: shape (rows,). A negative one turns the codes of its channel around; one of zero, or so small that
                the scale vanishes, makes them zero.
        """
        scales = (self.scales.astype(np.float64) * np.abs(factors)).astype(np.float32)
        scales[scales < SMALLEST_SCALE] = 0
        signs = np.where(scales == 0, 0, np.sign(factors)).astype(np.int8)
        return GridTensor(self.mask, self.codes * np.repeat(signs, row_counts(self.mask)), scales)


def grid_fault(tensor: GridTensor) -> str:
    """Says what is wrong with codes and scales that no writer makes; an empty text if nothing is.

    Files come from strangers, and readers that compute differently with such numbers would see different weights.
    """
    codes, scales = tensor.codes, tensor.scales
    if codes.min(initial=0) < -largest_code(8):
        return "a code is -128, where codes are symmetric"
    # Written so that NaN fails; -0 is refused by its sign.
    sound = (scales >= SMALLEST_SCALE) & (scales <= LARGEST_SCALE)
    zero = (scales == 0) & ~np.signbit(scales)
    if not (sound | zero).all():
        return (
            f"a scale is {scales[~(sound | zero)][0]}, where scales are 0 or normal positive numbers of which 127 do "
            f"not overflow"
        )
    if codes[np.repeat(zero, row_counts(tensor.mask))].any():
        return "a channel with a scale of 0 has codes other than 0"
    return ""


def largest_code(bits: int) -> int:
    """Returns the largest code of a grid of so many bits, such as 127 of 8."""
    return (1 << (bits - 1)) - 1


def row_counts(mask: Mask) -> npt.NDArray[np.int64]:
    """Returns the number of active entries of each row of a parameter as a matrix."""
    rows, columns = matrix_shape(mask.shape)
    if mask.stored is None:
        return np.full(rows, columns, np.int64)
    return np.diff(np.searchsorted(mask.stored, np.arange(rows + 1) * columns))


def shortened(scales: Floats) -> Floats:
    """Rounds scales to 11 significant bits, as every scale that is chosen has."""
    mantissas, exponents = np.frexp(scales)
    return cast("Floats", np.ldexp(np.rint(np.ldexp(mantissas, SCALE_BITS)), exponents - SCALE_BITS).astype(np.float32))
