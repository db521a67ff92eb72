"""Grid tensors: weights in few bits, a whole number each and one scale for each output channel.

A grid of b bits is symmetric: codes lie in [-q, q] with q = 2^(b-1) - 1, and code c of an output channel with scale s
has the value c · s. Zero is a code, so inactive entries stay zero and masks stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from dsr_tool.sparsity.layers import matrix_shape
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor

__all__ = [
    "SCALE_BITS",
    "GridTensor",
    "balanced",
    "best_scales",
    "distance",
    "grid_fault",
    "largest_code",
    "nearest_codes",
    "on_grid",
    "row_counts",
    "to_grid",
]

Codes = npt.NDArray[np.int8]
Floats = npt.NDArray[np.float32]

SCALE_BITS = 11
"""Significant bits of a scale that is chosen here, as in float16: with the 7 bits of a code, a product is exact in
float32, so a grid can be found again in values that were stored as floats."""

_SMALLEST, _LARGEST = np.finfo(np.float32).smallest_normal, np.finfo(np.float32).max
_SHRINK: dict[int, Floats] = {
    bits: np.linspace(least, 1, steps, dtype=np.float32)
    for bits, least, steps in ((4, 0.5, 26), (5, 0.6, 21), (6, 0.7, 16), (8, 1.0, 1))
}
"""Scales that are tried for each number of bits, as fractions of the one that reaches the largest weight. Cutting off
the largest weights makes all others finer; the fewer the bits, the further this pays. With 8 it does not: MobileNetV2
then gave .985 of the answers it has in float32 on 200 pictures, and .990 when nothing was cut off."""
_MOST_CUT = 4.0
"""Largest value, as a multiple of the largest one on its grid, that counts as cut off and not as another value. Scales
that are chosen here reach at least half of the largest weight; twice as much is left for those fitted to outputs."""
_BLOCK = 1 << 20
"""Weights whose scales are searched at a time, so that temporary arrays stay small."""


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
        scales[scales < _SMALLEST] = 0
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
    sound = (scales >= _SMALLEST) & (scales <= _LARGEST / largest_code(8))
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


def to_grid(tensor: SparseTensor, bits: int) -> GridTensor:
    """Rounds a tensor to a grid; values that lie on one already keep every bit.

    The scale of an output channel is the one that leaves the smallest sum of squared errors, among some that reach the
    largest weight or cut it off a little.

    Args:
        tensor: finite values, float32.
        bits: 2 to 8.
    """
    if (exact := on_grid(tensor, bits)) is not None:
        return exact
    scales = best_scales(tensor, bits)
    return GridTensor(tensor.mask, nearest_codes(tensor, scales, bits), scales)


def best_scales(tensor: SparseTensor, bits: int) -> Floats:
    """Returns the scale of each output channel by which rounding to the nearest code leaves the smallest square error.

    Args:
        tensor: finite values, float32.
        bits: 2 to 8.

    Returns:
        Shape (rows,), float32 of 11 significant bits; zero for channels without weights other than zero.
    """
    counts, values = row_counts(tensor.mask), tensor.values
    scales = np.zeros(len(counts), np.float32)
    for rows, entries in _blocks(counts):
        scales[rows] = _best(values[entries], counts[rows], bits)
    return scales


def balanced(rounded: GridTensor, exact: SparseTensor, bits: int) -> GridTensor:
    """Moves some codes to their second nearest, so that the errors of each output channel nearly cancel.

    Inputs behind a ReLU are positive, so a channel whose errors add up to something has another mean output. The codes
    that move are those that lie farthest from their values; see SQuant (Guo et al., ICLR 2022). MobileNetV2 in 5 bits
    gave .86 of the answers it has in float32 on 150 pictures, and .81 with the nearest codes.

    Args:
        rounded: the nearest codes.
        exact: the values, under an equal mask.
        bits: bits of a code.

    Returns:
        Codes within one step of their values; the errors of a channel, in steps, add up to half of one at most, unless
        there are too few codes that may move. Values that the largest code cuts off do not count.
    """
    counts, codes = row_counts(exact.mask), rounded.codes.copy()
    for rows, entries in _blocks(counts):
        codes[entries] = _cancelled(codes[entries], exact.values[entries], rounded.scales[rows], counts[rows], bits)
    return GridTensor(rounded.mask, codes, rounded.scales)


def nearest_codes(tensor: SparseTensor, scales: Floats, bits: int) -> Codes:
    """Returns the nearest code of each value, ties to even; values beyond the largest code get that one."""
    q = largest_code(bits)
    # A channel without a scale has nothing but zeros.
    divisors = np.repeat(np.where(scales == 0, np.float32(1), scales), row_counts(tensor.mask))
    codes: Codes = np.clip(np.rint(tensor.values / divisors), -q, q).astype(np.int8)
    return codes


def on_grid(tensor: SparseTensor, bits: int) -> GridTensor | None:
    """Finds the grid on which all values lie bit for bit; None if there is none with scales of 11 significant bits.

    Args:
        tensor: finite values, float32; a `GridTensor` is returned as it is if its codes fit.
        bits: 2 to 8.
    """
    q = largest_code(bits)
    if isinstance(tensor, GridTensor):
        return tensor if int(np.abs(tensor.codes).max(initial=0)) <= q else None
    counts, values = row_counts(tensor.mask), tensor.values
    # The sign of -0 would be lost.
    if np.signbit(values[values == 0]).any():
        return None
    largest = _row_maxima(np.abs(values), counts)
    scales = np.zeros(len(counts), np.float32)
    open_rows = np.flatnonzero(largest)
    # The largest value has some code between 1 and q; the first that explains the whole row is taken.
    for code in range(q, 0, -1):
        if not len(open_rows):
            break
        candidates = largest[open_rows] / np.float32(code)
        short = (_short(candidates) == candidates) & (candidates >= _SMALLEST)
        rows, candidates = open_rows[short], candidates[short]
        chosen = _entries(rows, counts)
        own, steps = values[chosen], np.repeat(candidates, counts[rows])
        fits = _row_all(np.rint(own / steps) * steps == own, counts[rows])
        scales[rows[fits]] = candidates[fits]
        open_rows = np.setdiff1d(open_rows, rows[fits], assume_unique=True)
    if len(open_rows):
        return None
    return GridTensor(tensor.mask, nearest_codes(tensor, scales, bits), scales)


def distance(rounded: GridTensor, exact: SparseTensor) -> float:
    """Returns the largest distance of a code from its exact value, in steps of its scale.

    Values that the largest code of their own channel cuts off count as met, up to four times that code.

    Args:
        rounded: the codes.
        exact: the values, under an equal mask.

    Returns:
        Half a step at most if every value got its nearest code; infinity if a channel without a scale has values for
        which there is a scale.
    """
    counts = row_counts(exact.mask)
    scales, values = np.repeat(rounded.scales, counts), exact.values
    # Folding a norm makes a scale zero where it would be no normal number; see `GridTensor.scaled`.
    vanished = (scales == 0) & (np.abs(values) <= _SMALLEST * largest_code(8))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        steps = np.where((values == 0) | vanished, 0, values / scales)
    codes = rounded.codes.astype(np.float32)
    ends = np.repeat(_row_maxima(np.abs(codes), counts), counts)
    beyond = (np.abs(steps) >= ends) & (np.abs(steps) <= _MOST_CUT * ends)
    cut = (np.abs(codes) == ends) & (np.sign(codes) == np.sign(steps)) & beyond
    return float(np.where(cut & (ends > 0), 0, np.abs(steps - codes)).max(initial=0.0))


def row_counts(mask: Mask) -> npt.NDArray[np.int64]:
    """Returns the number of active entries of each row of a parameter as a matrix."""
    rows, columns = matrix_shape(mask.shape)
    if mask.stored is None:
        return np.full(rows, columns, np.int64)
    return np.diff(np.searchsorted(mask.stored, np.arange(rows + 1) * columns))


def _blocks(counts: npt.NDArray[np.int64]) -> Iterator[tuple[slice, slice]]:
    """Yields whole rows, at least one of them, and their entries: about as many as are worked on at a time."""
    ends = np.cumsum(counts)
    first = 0
    while first < len(counts):
        start = int(ends[first] - counts[first])
        last = max(int(np.searchsorted(ends, start + _BLOCK, side="right")), first + 1)
        yield slice(first, last), slice(start, int(ends[last - 1]))
        first = last


def _cancelled(codes: Codes, values: Floats, scales: Floats, counts: npt.NDArray[np.int64], bits: int) -> Codes:
    """Returns the codes of some rows after those that were rounded the farthest have moved."""
    q, row_of = largest_code(bits), np.repeat(np.arange(len(counts)), counts)
    steps = values / np.where(scales == 0, np.float32(1), scales)[row_of]
    errors = np.where(np.abs(steps) > q, 0, codes - steps).astype(np.float64)
    sums = _row_sums(errors, counts)
    signs = np.sign(sums).astype(np.int8)
    towards = errors * signs[row_of]
    movable = np.flatnonzero((towards > 0) & (np.abs(codes - signs[row_of]) <= q))
    # By row, and the largest errors first: they are at most half a step.
    order = movable[np.argsort(row_of[movable] - towards[movable], kind="stable")]
    within = np.bincount(row_of[order], minlength=len(counts))
    place = np.arange(len(order)) - _starts(within)[row_of[order]]
    moved = order[place < np.rint(np.abs(sums))[row_of[order]]]
    codes[moved] -= signs[row_of[moved]]
    return codes


def _best(values: Floats, counts: npt.NDArray[np.int64], bits: int) -> Floats:
    """Returns the best scale of each row among the fractions that are tried."""
    q = largest_code(bits)
    largest = _row_maxima(np.abs(values), counts)
    best, least = np.zeros(len(counts), np.float32), np.full(len(counts), np.inf)
    for fraction in _SHRINK[min(_SHRINK, key=lambda known: abs(known - bits))]:
        scales = np.where(largest == 0, 0, np.clip(_short(largest * (fraction / q)), _SMALLEST, _highest(q)))
        steps = np.repeat(np.where(scales == 0, np.float32(1), scales), counts)
        errors = (np.clip(np.rint(values / steps), -q, q) * steps - values).astype(np.float64)
        sums = _row_sums(errors * errors, counts)
        better = sums < least
        best[better], least[better] = scales[better], sums[better]
    return best


def _short(scales: Floats) -> Floats:
    """Rounds positive floats to 11 significant bits."""
    mantissas, exponents = np.frexp(scales)
    return cast("Floats", np.ldexp(np.rint(np.ldexp(mantissas, SCALE_BITS)), exponents - SCALE_BITS).astype(np.float32))


def _highest(q: int) -> np.float32:
    """Returns a scale of 11 significant bits whose largest code is still finite."""
    mantissa, exponent = np.frexp(np.float64(_LARGEST) / q)
    highest: np.float32 = np.float32(np.ldexp(np.floor(np.ldexp(mantissa, SCALE_BITS)), exponent - SCALE_BITS))
    return highest


def _starts(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.cumsum(counts) - counts


def _row_maxima(magnitudes: Floats, counts: npt.NDArray[np.int64]) -> Floats:
    return cast("Floats", _reduced(np.maximum, magnitudes, counts, np.float32(0)))


def _row_sums(numbers: npt.NDArray[np.float64], counts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    return cast("npt.NDArray[np.float64]", _reduced(np.add, numbers, counts, np.float64(0)))


def _row_all(truths: npt.NDArray[np.bool_], counts: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    return cast("npt.NDArray[np.bool_]", _reduced(np.logical_and, truths, counts, np.True_))


def _reduced(operation: np.ufunc, entries: Any, counts: npt.NDArray[np.int64], empty: Any) -> Any:
    """Reduces the entries of each row; rows without entries get `empty`."""
    result = np.full(len(counts), empty)
    filled = counts > 0
    # Empty rows are left out: reduceat would give them the first entry of the next row.
    if filled.any():
        result[filled] = operation.reduceat(entries, _starts(counts[filled]))
    return result


def _entries(rows: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Returns the indices of all entries of some rows, one row after the other."""
    own = counts[rows]
    offsets = np.arange(int(own.sum())) - np.repeat(_starts(own), own)
    return np.repeat(_starts(counts)[rows], own) + offsets
