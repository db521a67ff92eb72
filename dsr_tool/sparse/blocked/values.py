"""Values between the steps of a network: a tensor in rows of images, in the blocked layout, or in both.

A value remembers each form once it was made, so that a tensor is laid out anew at most once in each direction.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from dsr_tool.sparse.blocked.layout import block, lanes_for, unblock

__all__ = ["Registers", "Value", "detached", "plain", "rows_at", "value_at"]

Registers: TypeAlias = list[Any]
"""The results of the steps so far: values, tensors of another kind, numbers, and tuples of them."""

_lanes = functools.lru_cache(maxsize=64)(lanes_for)


class Value:
    """A float32 tensor whose first dimension is images: (N, *rest).

    In lanes it is (blocks, *rest, lanes): every dimension but the first is where it was, and images are side by side in
    the last one. Operations that never mix images therefore run on either form alike.

    Attributes:
        images: N, without the padding of the last block.
    """

    __slots__ = ("_lanes", "_rows", "images")

    def __init__(self, images: int, *, lanes: Tensor | None = None, rows: Tensor | None = None) -> None:
        """Takes one form at least.

        Args:
            images: number of images.
            lanes: (blocks, *rest, lanes).
            rows: (N, *rest); 2 or 4 dimensions in all.
        """
        self.images, self._lanes, self._rows = images, lanes, rows

    @property
    def in_lanes(self) -> bool:
        """Whether the blocked form was made already."""
        return self._lanes is not None

    @property
    def rank(self) -> int:
        """Number of dimensions, that of the images included."""
        return self._rows.dim() if self._lanes is None and self._rows is not None else self.lanes.dim() - 1

    @property
    def shape(self) -> torch.Size:
        """(N, *rest)."""
        if self._lanes is None and self._rows is not None:
            return self._rows.shape
        return torch.Size((self.images, *self.lanes.shape[1:-1]))

    @property
    def lanes(self) -> Tensor:
        """The blocked form, (blocks, *rest, lanes)."""
        if self._lanes is None:
            assert self._rows is not None  # noqa: S101 - the constructor's contract
            made = block(self._rows, _lanes(self.images))
            self._lanes = made if self._rows.dim() == 4 else made.view(*made.shape[:2], made.shape[-1])
        return self._lanes

    @property
    def image(self) -> Tensor:
        """The blocked form with height and width, (blocks, C, H, W, lanes); a value (N, F) has one pixel.

        The rank must be 2 or 4.
        """
        lanes = self.lanes
        return lanes if lanes.dim() == 5 else lanes.reshape(*lanes.shape[:2], 1, 1, lanes.shape[2])

    @property
    def rows(self) -> Tensor:
        """The tensor as torch's operations take it, (N, *rest)."""
        return self.to_rows()

    def to_rows(self, *, channels_last: bool = False) -> Tensor:
        """Returns the tensor as torch's operations take it.

        Args:
            channels_last: memory format of four dimensions, if they have to be made.
        """
        if self._rows is None:
            lanes, shape = self.lanes, self.shape
            if lanes.dim() != 5:
                lanes = lanes.reshape(lanes.shape[0], math.prod(shape[1:]), 1, 1, lanes.shape[-1])
            made = unblock(lanes, self.images, channels_last=channels_last and len(shape) == 4)
            self._rows = made if len(shape) == 4 else made.view(shape)
        return self._rows

    def same(self, lanes: Tensor) -> Value:
        """Returns a value of the same images."""
        return Value(self.images, lanes=lanes)

    def detach(self) -> Value:
        """Returns a value of the same numbers without a history."""
        lanes, rows = (None if form is None else form.detach() for form in (self._lanes, self._rows))
        return Value(self.images, lanes=lanes, rows=rows)

    def written(self) -> None:
        """Forgets the blocked form, because somebody wrote into the rows."""
        self._lanes = None


def plain(held: Any) -> Any:
    """Returns what a register holds as torch's operations take it; tuples, lists and dictionaries are searched."""
    return mapped(held, lambda value: value.rows)


def detached(held: Any) -> Any:
    """Returns what a register holds without a history."""
    return mapped(held, Value.detach)


def mapped(held: Any, of_value: Callable[[Value], Any]) -> Any:
    """Returns what a register holds with another thing in place of each value."""
    if type(held) is Value:
        return of_value(held)
    if isinstance(held, (list, tuple)) and type(held) in (list, tuple):
        return type(held)(mapped(each, of_value) for each in held)
    if type(held) is dict:
        return {key: mapped(each, of_value) for key, each in held.items()}
    return held


def value_at(registers: Registers, index: int) -> Value | None:
    """Returns a register as a value, which it becomes if it holds a tensor that has a blocked form; else None."""
    held = registers[index]
    if type(held) is Value:
        return held
    if isinstance(held, Tensor) and held.dtype is torch.float32 and held.dim() in (2, 4) and held.numel():
        registers[index] = value = Value(held.shape[0], rows=held)
        return value
    return None


def rows_at(registers: Registers, index: int) -> Tensor | None:
    """Returns a register in rows of images, or as the tensor that it is; None if kernels cannot take that."""
    held = registers[index]
    rows = held.rows if type(held) is Value else held
    return rows if isinstance(rows, Tensor) and rows.dtype is torch.float32 and rows.numel() else None
