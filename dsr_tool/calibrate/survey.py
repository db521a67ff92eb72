"""What one run of a network shows about every weight: its uses, its inputs, the norm and the sum that follow it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from dsr_tool.calibrate.calls import Call, Watch, owners_of
from dsr_tool.calibrate.wide import moment_bytes, slices_of
from dsr_tool.sparse.flow import storage

__all__ = ["ADDITIONS", "NORMS", "Layer", "survey"]

_CHOOSING = frozenset({"nms", "nonzero", "topk", "sort", "masked_select", "unique"})
"""Operators whose result has another order or size for other values: what follows cannot be compared row by row."""

NORMS = frozenset({"native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "batch_norm"})
ADDITIONS = frozenset({"add", "add_"})
"""Operators that are a batch norm, and those that are a sum."""


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
        if operator in ADDITIONS and len(operands) == 2:
            for one, other in (operands, operands[::-1]):
                name, born = self._from.get(storage(one), ("", 0))
                # The other must be complete before this layer runs; of two branches, the later one sees both.
                if name and one.shape == other.shape and self._born.get(storage(other), 0) < born:
                    self.layers[name].joins = True

    def after(self, operator: str, operands: list[torch.Tensor], result: torch.Tensor) -> None:
        sources = {storage(operand) for operand in operands}
        if operator in NORMS and operands and storage(operands[0]) in self._from:
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
