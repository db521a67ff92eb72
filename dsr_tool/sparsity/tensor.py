"""A parameter as its mask and the values at the active positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from dsr_tool.sparsity.mask import Mask

__all__ = ["Array", "SparseTensor", "Weight", "dense"]

Array: TypeAlias = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class SparseTensor:
    """A parameter as its mask and the values at the active positions.

    Attributes:
        mask: the active positions.
        values: shape (mask.active,), in the order of the positions.
    """

    mask: Mask
    values: Array

    @classmethod
    def from_dense(cls, array: Array, mask: Mask) -> SparseTensor:
        """Gather the values of `array` under `mask`; under a full one they share its memory."""
        flat = array.reshape(-1)
        return cls(mask, flat if mask.stored is None else flat[mask.stored])

    def to_dense(self, out: Array | None = None) -> Array:
        """The parameter with exact (positive) zeros outside the mask; under a full one it shares memory.

        Args:
            out: zeros to write into, shape (size,); a new array when absent.
        """
        if self.mask.stored is None:
            if out is None:
                return self.values.reshape(self.mask.shape)
            out[:] = self.values
        else:
            if out is None:
                out = np.zeros(self.mask.size, dtype=self.values.dtype)
            out[self.mask.stored] = self.values
        return out.reshape(self.mask.shape)


Weight: TypeAlias = Array | SparseTensor


def dense(weight: Weight) -> Array:
    """The weight with its zeros."""
    if not isinstance(weight, SparseTensor):
        return weight
    if weight.mask.active == weight.mask.size:
        return weight.values.reshape(weight.mask.shape)
    return weight.to_dense()
