"""SparseTensor: a parameter as its mask and the values of the active entries."""

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
    """A parameter as its mask and the values of the active entries.

    Attributes:
        mask: active entries.
        values: their values, shape (mask.active,), in the order of the positions.
    """

    mask: Mask
    values: Array

    @classmethod
    def from_dense(cls, array: Array, mask: Mask) -> SparseTensor:
        """Gathers the values of `array` under `mask`. With a full mask they share the memory of `array`."""
        flat = array.reshape(-1)  # a view if the array is contiguous
        return cls(mask, flat if mask.stored is None else flat[mask.stored])

    def to_dense(self, out: Array | None = None) -> Array:
        """Returns the parameter with +0 outside the mask. With a full mask and no `out`, it shares memory.

        Args:
            out: array of zeros, shape (size,), to write to; default: a new array.
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
    """Returns a weight as an array with its zeros."""
    if not isinstance(weight, SparseTensor):
        return weight
    if weight.mask.active == weight.mask.size:
        return weight.values.reshape(weight.mask.shape)
    return weight.to_dense()
