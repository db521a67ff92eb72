"""The geometry of convolutions, and the cache of the plans that kernels run them by."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from dsr_tool.runtime.kernels.training import ConvPlan, Layer

__all__ = ["Geometry", "Plans"]

Pair = tuple[int, int]


@dataclass(frozen=True)
class Geometry:
    """A two-dimensional convolution, without its weights. Padding is with zeros.

    Attributes:
        out_channels: output channels.
        in_channels: input channels, of all groups.
        kernel: height and width of the kernel.
        stride: step between outputs, vertical and horizontal, as all pairs here.
        padding: pixels on both sides, or ((top, bottom), (left, right)).
        dilation: step between taps.
        groups: number of groups of channels.
    """

    out_channels: int
    in_channels: int
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair | tuple[Pair, Pair] = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    @property
    def pads(self) -> tuple[Pair, Pair]:
        """((top, bottom), (left, right)) in pixels."""
        (vertical, horizontal) = self.padding
        if isinstance(vertical, tuple) and isinstance(horizontal, tuple):
            return vertical, horizontal
        if isinstance(vertical, int) and isinstance(horizontal, int):
            return (vertical, vertical), (horizontal, horizontal)
        raise ValueError(f"padding {self.padding} is neither two numbers nor two pairs.")

    @property
    def weights(self) -> int:
        """Entries of the dense weight."""
        return self.out_channels * (self.in_channels // self.groups) * self.kernel[0] * self.kernel[1]

    def output_size(self, height: int, width: int) -> Pair:
        """Returns the height and the width of the output for those of an input.

        Raises:
            ValueError: if the kernel is larger than the padded input.
        """
        sizes = []
        for size, pads, kernel, stride, step in zip(
            (height, width), self.pads, self.kernel, self.stride, self.dilation, strict=True
        ):
            room = size + sum(pads) - step * (kernel - 1) - 1
            if room < 0:
                raise ValueError(f"a kernel of {self.kernel} with dilation {self.dilation} is larger than the input.")
            sizes.append(room // stride + 1)
        return sizes[0], sizes[1]


class Plans:
    """A cache of plans, which belong to one process: copies and pickles of it are empty.

    A layer has one plan for each direction, size of input and number of lanes. It is made again when the positions of
    the layer have changed.
    """

    def __init__(self) -> None:
        self._plans: dict[Hashable, tuple[int, ConvPlan]] = {}

    def get(
        self,
        name: str,
        version: int,
        positions: Tensor,
        geometry: Geometry,
        shape: tuple[int, ...],
        *,
        gradient: bool = False,
    ) -> ConvPlan:
        """Returns the plan of a layer.

        Args:
            name: name of the layer.
            version: number that changes with the positions.
            positions: (nnz,) int32: flat indices of the non-zeros in the dense weight, ascending.
            geometry: the convolution.
            shape: (blocks, in_channels, height, width, lanes) of the input.
            gradient: whether the plan is for the gradient to the input.
        """
        blocks, _, height, width, lanes = shape
        # A plan may take several blocks at once, which changes the order of its sums. It must not depend on the batch
        # that came first, or a training that resumes would round in another way.
        blocks = _at_once(blocks, min(height * width, math.prod(geometry.output_size(height, width))) * lanes)
        key = (name, geometry, height, width, lanes, blocks, gradient)
        made_for, plan = self._plans.get(key, (None, None))
        if plan is None or made_for != version:
            plan = self.make(name, positions, geometry, (blocks, height, width, lanes), gradient=gradient)
            self._plans[key] = (version, plan)
        return plan

    def make(
        self,
        name: str,  # noqa: ARG002 - for plans of another kind, which read their positions by name
        positions: Tensor,
        geometry: Geometry,
        size: tuple[int, int, int, int],
        *,
        gradient: bool,
    ) -> ConvPlan:
        """Makes the plan of a layer whose kernel is no larger than its padded input; `get` calls it.

        Args:
            name: name of the layer.
            positions: as for `get`.
            geometry: the convolution.
            size: blocks that the plan may take at once, height, width and lanes.
            gradient: whether the plan is for the gradient to the input.
        """
        if positions.dtype != torch.int32 or not positions.is_contiguous() or positions.device.type != "cpu":
            raise ValueError(
                f"positions are {positions.dtype} on {positions.device}; they must be contiguous int32 on the CPU."
            )
        blocks, height, width, lanes = size
        (top, bottom), (left, right) = geometry.pads
        layer = Layer(
            geometry.out_channels, geometry.in_channels, *geometry.kernel, *geometry.stride, top, left, bottom, right,
            *geometry.dilation, geometry.groups, height, width, lanes, blocks, gradient,
        )  # fmt: skip
        return ConvPlan(layer, positions.data_ptr(), positions.numel())

    @property
    def bytes(self) -> int:
        """Memory of all plans, in bytes."""
        return sum(plan.bytes for _, plan in self._plans.values())

    def clear(self) -> None:
        """Forgets all plans."""
        self._plans.clear()

    def __len__(self) -> int:
        return len(self._plans)

    def __deepcopy__(self, memo: dict[int, object]) -> Plans:
        return Plans()

    def __reduce__(self) -> tuple[type[Plans], tuple[()]]:
        return Plans, ()


_MOST_FLOATS = 512
"""Floats of several blocks' rows that one plan may hold in registers, at least; those of AVX-512 hold 320."""


def _at_once(blocks: int, floats: int) -> int:
    """Returns the largest number of blocks, a power of two, that a plan for small planes may take at once."""
    most = min(blocks, max(_MOST_FLOATS // max(floats, 1), 1))
    return 1 << (most.bit_length() - 1)
