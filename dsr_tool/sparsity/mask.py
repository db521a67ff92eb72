"""Which entries of one parameter are active: bits, count, positions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from dsr_tool.errors import FormatError

__all__ = ["MAX_RANK", "Mask", "entropy_bound_bits"]

MAX_RANK = 32
"""Largest number of dimensions of a tensor, the limit of numpy before 2.0."""


def entropy_bound_bits(size: int, active: int) -> float:
    """log2 C(size, active): bits that any code needs for a mask of which only the count is known."""
    lgamma = math.lgamma
    nats = lgamma(size + 1) - lgamma(active + 1) - lgamma(size - active + 1)
    return max(nats / math.log(2), 0.0)


@dataclass(frozen=True, eq=False)
class Mask:
    """The active entries of one parameter, as sorted flat positions in row-major order.

    A grown weight starts at zero, so a mask says more than which weights differ from zero.

    Attributes:
        shape: shape of the parameter.
        stored: strictly increasing int64 flat positions of the active entries, shape (active,); None for all, so that
            dense parameters cost nothing.
    """

    shape: tuple[int, ...]
    stored: npt.NDArray[np.int64] | None = None

    @classmethod
    def from_bool(cls, active: npt.NDArray[np.bool_]) -> Mask:
        """The mask of a boolean array, True where active."""
        return cls(active.shape, None if active.all() else np.flatnonzero(active).astype(np.int64, copy=False))

    @classmethod
    def full(cls, shape: tuple[int, ...]) -> Mask:
        """The mask of a dense parameter: everything is active."""
        return cls(shape)

    @classmethod
    def from_bits(cls, bits: npt.NDArray[np.uint8], shape: tuple[int, ...]) -> Mask:
        """The mask stored as packed bits, first entry in the highest bit of the first byte.

        Raises:
            FormatError: the bytes do not fit the shape, or a padding bit is set.
        """
        size = math.prod(shape)
        if bits.dtype != np.uint8 or bits.shape != ((size + 7) // 8,):
            raise FormatError(
                f"a mask of shape {shape} takes {(size + 7) // 8} bytes, but {bits.shape} of {bits.dtype} were given; "
                f"the file was written for another model or is damaged."
            )
        unpacked = np.unpackbits(bits)
        if unpacked[size:].any():
            raise FormatError(f"a mask of shape {shape} has bits set past its end; the file is damaged.")
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

    @property
    def density(self) -> float:
        """Fraction of active entries, in [0, 1]."""
        return self.active / self.size if self.size else 0.0

    @cached_property
    def bits(self) -> npt.NDArray[np.uint8]:
        """Packed bits, shape (ceil(size / 8),); the inverse of `from_bits`."""
        return np.packbits(self.to_bool().reshape(-1))

    def equals(self, other: Mask) -> bool:
        """Whether the same entries of the same shape are active."""
        if self.shape != other.shape or self.active != other.active:
            return False
        return self.active == self.size or np.array_equal(self.positions, other.positions)

    def to_bool(self) -> npt.NDArray[np.bool_]:
        """Boolean array of `shape`, True where active."""
        if self.stored is None:
            return np.ones(self.shape, dtype=np.bool_)
        flat = np.zeros(self.size, dtype=np.bool_)
        flat[self.stored] = True
        return flat.reshape(self.shape)

    @property
    def entropy_bound_bits(self) -> float:
        """log2 C(size, active), the bits that this mask needs at least."""
        return entropy_bound_bits(self.size, self.active)
