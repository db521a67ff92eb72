"""Mask: the active entries of one parameter, as bits or positions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from dsr_tool.errors import FormatError

__all__ = ["MAX_RANK", "Mask", "entropy_bound_bits"]

MAX_RANK = 32
"""Largest number of dimensions of a tensor: the limit of numpy before version 2.0."""


def entropy_bound_bits(size: int, active: int) -> float:
    """Returns log2 C(size, active): the bits that any code needs for a mask if only its count is known."""
    # By lgamma: the binomial coefficient of a layer has millions of digits.
    lgamma = math.lgamma
    nats = lgamma(size + 1) - lgamma(active + 1) - lgamma(size - active + 1)
    return max(nats / math.log(2), 0.0)


@dataclass(frozen=True, eq=False)
class Mask:
    """The active entries of one parameter, as sorted flat positions in row-major order.

    A grown weight starts at zero, so the mask cannot be computed from the weights.

    Attributes:
        shape: shape of the parameter.
        stored: strictly increasing int64 flat positions of the active entries, shape (active,); None if all entries are
            active, so that masks of dense parameters need no memory.
    """

    shape: tuple[int, ...]
    stored: npt.NDArray[np.int64] | None = None

    @classmethod
    def from_bool(cls, active: npt.NDArray[np.bool_]) -> Mask:
        """Returns the mask of a boolean array that is True where active."""
        return cls(active.shape, None if active.all() else np.flatnonzero(active).astype(np.int64, copy=False))

    @classmethod
    def full(cls, shape: tuple[int, ...]) -> Mask:
        """Returns the mask of a dense parameter: all entries are active."""
        return cls(shape)

    @classmethod
    def from_bits(cls, bits: npt.NDArray[np.uint8], shape: tuple[int, ...]) -> Mask:
        """Returns the mask of packed bits, with the first entry in the highest bit of the first byte.

        Raises:
            FormatError: the number of bytes does not fit the shape, or a padding bit is set.
        """
        size = math.prod(shape)
        if bits.dtype != np.uint8 or bits.shape != ((size + 7) // 8,):
            raise FormatError(
                f"a mask of shape {shape} needs {(size + 7) // 8} bytes, but has {bits.shape} of {bits.dtype}; the "
                f"file was written for another model or is damaged."
            )
        # Padding must be zero: a mask has one encoding, so equal masks have equal bytes.
        unpacked = np.unpackbits(bits)
        if unpacked[size:].any():
            raise FormatError(f"a mask of shape {shape} has bits set after its last entry; the file is damaged.")
        return cls.from_bool(unpacked[:size].reshape(shape).view(np.bool_))

    @property
    def size(self) -> int:
        """Number of entries of the parameter."""
        return math.prod(self.shape)

    @property
    def positions(self) -> npt.NDArray[np.int64]:
        """Strictly increasing flat positions of the active entries, shape (active,)."""
        return np.arange(self.size, dtype=np.int64) if self.stored is None else self.stored

    @property
    def active(self) -> int:
        """Number of active entries."""
        return self.size if self.stored is None else len(self.stored)

    def reshaped(self, shape: tuple[int, ...]) -> Mask:
        """Returns the same entries in another shape of as many."""
        return Mask(shape, self.stored)

    @property
    def density(self) -> float:
        """Fraction of active entries, in [0, 1]."""
        return self.active / self.size if self.size else 0.0

    @cached_property
    def bits(self) -> npt.NDArray[np.uint8]:
        """Packed bits, shape (ceil(size / 8),); the inverse of `from_bits`."""
        return np.packbits(self.to_bool().reshape(-1))

    def equals(self, other: Mask) -> bool:
        """Returns whether both masks have the same shape and the same active entries."""
        if self.shape != other.shape or self.active != other.active:
            return False
        # Full masks may differ in `stored`: None, or all positions.
        return self.active == self.size or np.array_equal(self.positions, other.positions)

    def to_bool(self) -> npt.NDArray[np.bool_]:
        """Returns a boolean array of `shape` that is True where active."""
        if self.stored is None:
            return np.ones(self.shape, dtype=np.bool_)
        flat = np.zeros(self.size, dtype=np.bool_)
        flat[self.stored] = True
        return flat.reshape(self.shape)

    @property
    def entropy_bound_bits(self) -> float:
        """Lower bound of the bits of an encoded mask: log2 C(size, active)."""
        return entropy_bound_bits(self.size, self.active)
