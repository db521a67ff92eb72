"""Collects what a layer reads in the sparse network and what it wrote in the dense one, as sums of products."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch

from dsr_tool.calibrate.calls import Call, Watch
from dsr_tool.calibrate.survey import ADDITIONS, NORMS, Layer
from dsr_tool.errors import CheckFailed
from dsr_tool.sparse.flow import storage

__all__ = ["Collector", "Reached", "Sample", "Statistics"]


class Reached(Exception):  # noqa: N818 - ends a pass early, no error
    """Everything that a pass collects has been seen."""


@dataclass
class Statistics:
    """Sums over the input vectors x of one layer and its targets t, by group or part.

    Inputs are measured from an origin near their mean, or the variance of inputs that hardly vary would be rounding.

    Attributes:
        origin: what is subtracted from every x, the mean of the first vectors, shape (blocks, columns).
        xx: sum of x x^T, shape (blocks, columns, columns).
        tx: sum of t x^T, shape (blocks, rows, columns).
        x: sum of x, shape (blocks, columns).
        t: sum of t, shape (blocks, rows).
        tt: sum of t^2, shape (blocks, rows).
        count: number of vectors per block, shape (blocks,).
    """

    origin: torch.Tensor
    xx: torch.Tensor
    tx: torch.Tensor
    x: torch.Tensor
    t: torch.Tensor
    tt: torch.Tensor
    count: torch.Tensor

    @classmethod
    def zeros(cls, blocks: int, rows: int, columns: int) -> Statistics:
        """Returns the sums of nothing."""
        zeros = torch.zeros
        return cls(
            origin=zeros(blocks, columns),
            xx=zeros(blocks, columns, columns),
            tx=zeros(blocks, rows, columns),
            x=zeros(blocks, columns),
            t=zeros(blocks, rows),
            tt=zeros(blocks, rows),
            count=zeros(blocks),
        )

    def add(self, first: int, x: torch.Tensor, t: torch.Tensor) -> None:
        """Adds vectors of consecutive blocks, shapes (blocks, vectors, columns) and (blocks, vectors, rows)."""
        blocks = slice(first, first + len(x))
        # Slices are views, so these write into the sums.
        self.origin[blocks] = torch.where(self.count[blocks, None] > 0, self.origin[blocks], x.mean(1))
        x = x - self.origin[blocks, None]
        self.xx[blocks].baddbmm_(x.mT, x)
        self.tx[blocks].baddbmm_(t.mT, x)
        self.x[blocks] += x.sum(1)
        self.t[blocks] += t.sum(1)
        self.tt[blocks] += t.square().sum(1)
        self.count[blocks] += x.shape[1]


@dataclass
class Sample:
    """One use of a layer in one pass: its positions, inputs, outputs, and what its output was added to."""

    call: Call
    rows: torch.Tensor
    inputs: torch.Tensor | None = None
    outputs: torch.Tensor | None = None
    addend: torch.Tensor | None = None


class Collector(Watch):
    """Collects the samples of some layers in one pass, and ends the pass when it has them.

    Attributes:
        samples: the uses of each layer in order, by name.
    """

    def __init__(
        self,
        owners: Mapping[int, str],
        layers: Collection[Layer],
        rows: Callable[[Call, int], torch.Tensor],
        *,
        inputs: bool,
        to_the_end: bool = False,
    ) -> None:
        """Prepares a pass.

        Args:
            owners: names of the network's tensors, see `calls.owners_of`.
            layers: the layers to collect.
            rows: returns the positions to sample of a call, given its number among the uses of its weight.
            inputs: whether inputs are collected, as in the sparse network, or outputs, as in the dense one.
            to_the_end: whether the pass goes on when everything is seen.
        """
        super().__init__(owners)
        self._layers = {layer.name: layer for layer in layers}
        self._rows, self._inputs, self._to_the_end = rows, inputs, to_the_end
        self.samples: dict[str, list[Sample]] = {name: [] for name in self._layers}
        self._missing = {layer.name: layer.uses + layer.joins for layer in layers}
        self._from: dict[int, tuple[str, torch.Tensor]] = {}

    def _found(self, name: str) -> None:
        self._missing[name] -= 1
        if not self._to_the_end and not any(self._missing.values()):
            raise Reached

    def seen(self, call: Call) -> None:
        """Samples a use: its inputs before the operator runs, its outputs after it."""
        if call.name not in self._layers:
            return
        uses = self.samples[call.name]
        if call.output is None:
            if not call.operand.sum().isfinite():  # ten times faster than testing every value
                raise CheckFailed(
                    f"the inputs of layer {call.name!r} contain NaN or inf; check the pictures' normalisation and the "
                    f"weights before it."
                )
            sample = Sample(call, self._rows(call, len(uses)))
            uses.append(sample)
            if self._inputs:
                sample.inputs = call.inputs(sample.rows)
                self._found(call.name)
            return
        if not self._inputs:
            uses[-1].outputs = call.outputs(uses[-1].rows)
        if self._layers[call.name].joins:
            self._from[storage(call.output)] = (call.name, call.output)
        if not self._inputs:
            self._found(call.name)

    def before(self, operator: str, operands: list[torch.Tensor]) -> None:
        """Samples what a layer's output is added to."""
        if operator not in ADDITIONS or len(operands) != 2:
            return
        for one, other in (operands, operands[::-1]):
            if storage(one) in self._from and one.shape == other.shape:
                name, output = self._from.pop(storage(one))
                sample = self.samples[name][-1]
                # The other operand in the layout of the layer's output, of which `one` may be a transposed view.
                placed = torch.empty_like(output, memory_format=torch.preserve_format)
                placed.as_strided(one.shape, one.stride(), one.storage_offset()).copy_(other)
                sample.addend = sample.call.outputs(sample.rows, placed)
                self._found(name)

    def after(self, operator: str, operands: list[torch.Tensor], result: torch.Tensor) -> None:
        """Follows a layer's output through its norm."""
        if operator in NORMS and operands and storage(operands[0]) in self._from:
            self._from[storage(result)] = (self._from.pop(storage(operands[0]))[0], result)
