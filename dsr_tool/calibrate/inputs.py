"""Collects what a layer reads in the sparse network and what it wrote in the dense one, as sums of products."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from dsr_tool.calibrate.calls import Call, Watch, owners_of, storage
from dsr_tool.calibrate.wide import moment_bytes, slices_of
from dsr_tool.errors import CheckFailed

__all__ = ["Collector", "Layer", "Reached", "Sample", "Statistics", "survey"]

_CHOOSING = frozenset({"nms", "nonzero", "topk", "sort", "masked_select", "unique"})
"""Operators whose result has another order or size for other values: what follows cannot be compared row by row."""

_NORMS = frozenset({"native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "batch_norm"})
_ADDITIONS = frozenset({"add", "add_"})


@dataclass
class Layer:
    """What a run of the network shows about one weight.

    Attributes:
        name: name of the weight.
        uses: number of calls that read it.
        columns: length of its input vectors.
        groups: groups of a convolution.
        taps: entries of a kernel of a convolution, else 1.
        parts: number of parts in which it is read; 3 for a packed projection with separate inputs.
        length: input vectors per picture, over all uses.
        norm: module path of the batch norm that directly follows, empty if none does.
        joins: whether its output, or that norm's, is added to a value which was there before.
        aligned: whether the same row of its input means the same thing in the dense and the sparse network.
    """

    name: str
    uses: int = 0
    columns: int = 1
    groups: int = 1
    taps: int = 1
    parts: int = 1
    length: float = 0.0
    norm: str = ""
    joins: bool = False
    aligned: bool = True

    @property
    def slices(self) -> int:
        """Number of slices in which its columns are fitted; 1 unless its moments would be too large."""
        return slices_of(self.groups * self.parts, self.columns, self.taps)

    @property
    def moment_bytes(self) -> int:
        """Bytes of the second moments of its inputs."""
        return moment_bytes(self.groups * self.parts, self.columns, self.taps)


class Reached(Exception):  # noqa: N818 - ends a pass early, no error
    """Everything that a pass collects has been seen."""


class _Survey(Watch):
    """Notes every use of a weight, in order, and what follows it."""

    def __init__(self, owners: Mapping[int, str], shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__(owners)
        self._shapes = shapes
        self.layers: dict[str, Layer] = {}
        self._aligned = True
        self._clock = 0
        self._born: dict[int, int] = {}
        self._from: dict[int, tuple[str, int]] = {}
        self._alive: list[torch.Tensor] = []

    def seen(self, call: Call) -> None:
        if call.output is None:
            return
        layer = self.layers.setdefault(call.name, Layer(call.name, aligned=self._aligned))
        layer.uses += 1
        layer.groups, layer.columns, layer.taps = call.groups, call.columns, call.taps
        layer.length += call.length
        rows = call.output.shape[1 if call.geometry else -1]
        if not call.geometry:
            layer.parts = self._shapes[call.name][0] // rows
        self._note(call.output)
        self._from[storage(call.output)] = (call.name, self._clock)

    def _note(self, result: torch.Tensor) -> None:
        """Keeps a result alive, so that no later one gets its address, and its time."""
        self._clock += 1
        self._born[storage(result)] = self._clock
        self._alive.append(result)

    def before(self, operator: str, operands: list[torch.Tensor]) -> None:
        self._aligned &= operator not in _CHOOSING
        if operator in _ADDITIONS and len(operands) == 2:
            for one, other in (operands, operands[::-1]):
                name, born = self._from.get(storage(one), ("", 0))
                # The other must be complete before this layer runs; of two branches, the later one sees both.
                if name and one.shape == other.shape and self._born.get(storage(other), 0) < born:
                    self.layers[name].joins = True

    def after(self, operator: str, operands: list[torch.Tensor], result: torch.Tensor) -> None:
        sources = {storage(operand) for operand in operands}
        if operator in _NORMS and operands and storage(operands[0]) in self._from:
            name, born = self._from[storage(operands[0])]
            statistics = [self._owners[s] for s in sources if self._owners.get(s, "").endswith(".running_mean")]
            if statistics and not self.layers[name].norm:
                self.layers[name].norm = statistics[0].rpartition(".")[0]
                self._note(result)
                self._from[storage(result)] = (name, born)
                return
        if storage(result) not in sources:
            self._note(result)
        elif operator.endswith("_"):  # changed in place: no longer what the layer wrote
            self._from.pop(storage(result), None)


def survey(module: nn.Module, run: Callable[[], object]) -> dict[str, Layer]:
    """Returns every weight that a run reads, in the order of first use.

    Args:
        module: the network.
        run: runs it on one input.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    watch = _Survey(owners_of(module), shapes)
    with watch:
        run()
    for layer in watch.layers.values():
        layer.joins &= layer.uses == 1
    return watch.layers


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
    """What one use of a layer showed in one pass: positions, inputs, outputs, and what its output was added to."""

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
        module: nn.Module,
        layers: Collection[Layer],
        rows: Callable[[Call, int], torch.Tensor],
        *,
        inputs: bool,
        to_the_end: bool = False,
    ) -> None:
        """Prepares a pass.

        Args:
            module: the network.
            layers: the layers to collect.
            rows: returns the positions to sample of a call, given its number among the uses of its weight.
            inputs: whether inputs are collected, as in the sparse network, or outputs, as in the dense one.
            to_the_end: whether the pass goes on when everything is seen.
        """
        super().__init__(owners_of(module))
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
        if operator not in _ADDITIONS or len(operands) != 2:
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
        if operator in _NORMS and operands and storage(operands[0]) in self._from:
            self._from[storage(result)] = (self._from.pop(storage(operands[0]))[0], result)
