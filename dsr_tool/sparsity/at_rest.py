"""Tensors at rest: parameters that are kept to be read seldom, in little memory.

A session reads its tensors when it makes a plan, and keeps them for the plan of another input. Positions of 8 bytes
would be most of that memory, so a mask at rest is one bit for each entry.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from dsr_tool.sparsity.grid import GridTensor
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import Array, SparseTensor, Weight

__all__ = ["BitMask", "arrays_of", "at_rest", "dtype_of"]


class BitMask(Mask):
    """A mask that holds its bits alone; positions are computed whenever they are asked for."""

    def __init__(self, mask: Mask) -> None:
        """Takes over the active entries of a mask that has positions."""
        self._set(mask.shape, mask.active, np.packbits(mask.to_bool()))

    def _set(self, shape: tuple[int, ...], active: int, bits: npt.NDArray[np.uint8]) -> None:
        # The class is frozen, as its base is; `stored` is computed, so the base's own __init__ does not run.
        for name, part in (("shape", shape), ("_active", active), ("bits", bits)):
            object.__setattr__(self, name, part)

    def reshaped(self, shape: tuple[int, ...]) -> BitMask:
        """Returns the same entries in another shape of as many; both share their bits."""
        reshaped = object.__new__(BitMask)
        reshaped._set(shape, self.active, self.bits)
        return reshaped

    @property
    def stored(self) -> npt.NDArray[np.int64]:
        """Strictly increasing int64 flat positions of the active entries, shape (active,), as a new array."""
        # numpy finds the entries of bools several times as fast as those of numbers.
        active = np.unpackbits(self.bits, count=self.size).view(np.bool_)
        return np.flatnonzero(active).astype(np.int64, copy=False)

    @property
    def positions(self) -> npt.NDArray[np.int64]:
        """The same as `stored`, which is computed once here: a mask of bits has positions."""
        return self.stored

    @property
    def active(self) -> int:
        """Number of active entries."""
        active: int = self._active  # type: ignore[attr-defined]
        return active


def at_rest(tensor: SparseTensor) -> SparseTensor:
    """Returns the same tensor with a mask of bits, if that is smaller than its positions; a grid stays one."""
    stored = tensor.mask.stored
    # Positions that are no mask have no bits; whoever reads them says that the file is damaged.
    if stored is None or stored.nbytes * 8 <= tensor.mask.size or not _ascend(stored, tensor.mask.size):
        return tensor
    mask = BitMask(tensor.mask)
    if isinstance(tensor, GridTensor):
        return GridTensor(mask, tensor.codes, tensor.scales)
    return SparseTensor(mask, tensor.values)


def arrays_of(tensor: SparseTensor) -> list[Array]:
    """Returns the arrays that a tensor holds, without computing any: its memory."""
    mask = tensor.mask
    entries: list[Array] = [tensor.codes, tensor.scales] if isinstance(tensor, GridTensor) else [tensor.values]
    positions = mask.bits if isinstance(mask, BitMask) else mask.stored
    return entries if positions is None else [positions, *entries]


def dtype_of(weight: Weight) -> np.dtype[Any]:
    """Returns the type of a weight's values; those of a grid need not be computed for it."""
    if isinstance(weight, GridTensor):
        return np.dtype(np.float32)
    return weight.values.dtype if isinstance(weight, SparseTensor) else weight.dtype


def _ascend(positions: npt.NDArray[np.int64], size: int) -> bool:
    return len(positions) == 0 or bool(positions[0] >= 0 and positions[-1] < size and (np.diff(positions) > 0).all())
