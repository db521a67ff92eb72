"""CompactStore: the active weights of a network in one flat parameter.

A layer has no weight of its own. Its values are a slice of the flat parameter, and its positions a slice of a vector of
int32 beside it; gradients and optimizer state are vectors of the same length. The number of active weights of the whole
network is constant, so that a layer grows while another shrinks without any new parameter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from dsr_tool.errors import UsageError
from dsr_tool.sparse.compact.layer_parameters import LayerParameters
from dsr_tool.sparse.compact.rebuild import Rebuilt, rebuild
from dsr_tool.sparsity.granularity import SINGLE

__all__ = ["CompactLayer", "CompactStore", "Entry", "UnexpectedAccessError", "frozen_before", "trained_before"]

_MOST_POSITIONS = 2**31 - 1
"""Largest number of weights of a layer: positions are int32."""


class UnexpectedAccessError(RuntimeError):
    """Signals that a network reads a sparse weight itself while it is traced, where only its layers may."""


def frozen_before(name: str) -> UsageError:
    """Returns the error for an attempt to train a layer that was frozen when its store was made."""
    return UsageError(
        f"{name!r} was frozen when the model became compact, so it has no gradient to train by; call "
        f"model.to_storage('masked'), unfreeze the layer, and then make the model compact again."
    )


def trained_before(name: str) -> UsageError:
    """Returns the error for an attempt to freeze a layer that was trained when its store was made."""
    return UsageError(
        f"{name!r} is trained together with all sparse weights in compact storage; call model.to_storage('masked'), "
        f"freeze the layer, and then make the model compact again."
    )


@dataclass(frozen=True)
class Entry:
    """A sparse weight that goes into a store.

    Attributes:
        name: name of the parameter.
        shape: its dense shape.
        positions: int32 flat positions of the active weights in row-major order, strictly increasing, shape (active,).
        values: their values, shape (active,).
        trained: whether it has a gradient; frozen weights are held apart, out of the optimizer's sight.
    """

    name: str
    shape: tuple[int, ...]
    positions: torch.Tensor
    values: torch.Tensor
    trained: bool = True

    @classmethod
    def of(cls, name: str, weight: torch.Tensor, positions: torch.Tensor, *, trained: bool = True) -> Entry:
        """Returns the entry of a dense weight, in any memory format, whose active positions are these int64 ones."""
        # `take` counts in row-major order in every memory format.
        return cls(name, tuple(weight.shape), positions.to(torch.int32), weight.detach().take(positions), trained)


@dataclass(frozen=True)
class CompactLayer:
    """Where a layer lies in the flat vectors.

    Attributes:
        name: name of its weight.
        shape: dense shape of the weight.
        start: index of its first value in the flat vector.
        count: number of its active weights.
        trained: whether its values are in the parameter, or in the vector of frozen values.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    count: int
    trained: bool = True

    @property
    def size(self) -> int:
        """Number of weights, active or not."""
        return math.prod(self.shape)


class CompactStore:
    """All sparse weights of a network.

    Attributes:
        values: flat parameter of the trained layers' values, shape (capacity,). Values past the active ones are zero;
            a method that lowers the density leaves them behind.
        positions: int32 positions of the same weights, each within its layer, shape (capacity,).
        frozen_values: values of the layers that are not trained, flat.
        frozen_positions: their positions.
        layers: the layers by name, in the order of the masks.
        version: a number that grows with each change of positions, by which plans of kernels know that they are old.
        kernels: whether passes may run on kernels; if not, dense weights are rebuilt.
        wants_gradients: whether the next backward pass keeps the largest gradients of inactive weights, because a
            method grows by them after the step.
        granularity: pattern of the masks, by which those gradients are the largest of each block.
        gradients: what it kept, by layer: int64 positions in the layer, and their gradients in float32.
        by_layer: parameters of the layers, once somebody asked for them; else None.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        """Copies all entries into flat vectors.

        Raises:
            UsageError: the entries differ in type or device, or a layer is too large for int32 positions.
        """
        _check(entries)
        self.version = 0
        self.wants_gradients = False
        self.granularity = SINGLE
        self.kernels = True
        self.gradients: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.by_layer: LayerParameters | None = None
        self._pieces: dict[str, torch.Tensor] | None = None
        self._tracing = self._naming = False
        self._stand_ins: Mapping[str, Any] = {}
        trained = [entry for entry in entries if entry.trained]
        frozen = [entry for entry in entries if not entry.trained]
        self.values = nn.Parameter(_joined([entry.values for entry in trained], entries))
        self.positions = _joined_positions([entry.positions for entry in trained], self.values)
        self.frozen_values = _joined([entry.values for entry in frozen], entries)
        self.frozen_positions = _joined_positions([entry.positions for entry in frozen], self.values)
        starts = {True: 0, False: 0}
        self.layers: dict[str, CompactLayer] = {}
        for entry in entries:
            count = entry.values.numel()
            self.layers[entry.name] = CompactLayer(
                entry.name, entry.shape, starts[entry.trained], count, trained=entry.trained
            )
            starts[entry.trained] += count

    @property
    def active(self) -> int:
        """Number of active weights of the trained layers; `values` may be longer."""
        return sum(layer.count for layer in self.layers.values() if layer.trained)

    @property
    def trained(self) -> list[str]:
        """Names of the layers whose values are in the parameter."""
        return [name for name, layer in self.layers.items() if layer.trained]

    def parameters(self) -> LayerParameters:
        """Returns the parameters of the layers, made when they are first asked for."""
        if self.by_layer is None:
            self.by_layer = LayerParameters(self)
        self.by_layer.follow_flags()
        return self.by_layer

    def require_flags(self) -> None:
        """Raises `UsageError` if a layer was frozen or unfrozen alone, which one flat parameter cannot follow."""
        if self.by_layer is None:
            return
        if (name := self.by_layer.changed()) is not None:
            raise frozen_before(name) if self.by_layer[name].requires_grad else trained_before(name)
        # All of them may have been frozen or unfrozen together, by the network.
        self.by_layer.follow_flags()

    def values_of(self, name: str) -> torch.Tensor:
        """Returns the values of a layer, shape (active,), through which gradients reach the parameter."""
        if self._pieces is not None and name in self._pieces:
            return self._pieces[name]
        layer = self.layers[name]
        return (self.values if layer.trained else self.frozen_values).narrow(0, layer.start, layer.count)

    def positions_of(self, name: str) -> torch.Tensor:
        """Returns the positions of a layer, int32 of shape (active,)."""
        layer = self.layers[name]
        return (self.positions if layer.trained else self.frozen_positions).narrow(0, layer.start, layer.count)

    def dense(self, name: str) -> torch.Tensor:
        """Returns a layer's dense weight, made anew; its gradient reaches the parameter.

        Raises:
            UnexpectedAccessError: the network is being traced.
        """
        if self._tracing:
            raise UnexpectedAccessError(f"it reads the weight {name!r} outside of its layer")
        return rebuild(self.values_of(name), Rebuilt(self, name))

    def read(self, name: str) -> Any:
        """Returns what a module gets for its weight: the dense weight, or inside `standing_in` what stands for it."""
        return self._stand_ins[name] if name in self._stand_ins else self.dense(name)

    @contextmanager
    def standing_in(self, stand_ins: Mapping[str, Any]) -> Iterator[None]:
        """Gives modules something else for their weights inside: an object that functions of torch accept."""
        before, self._stand_ins = self._stand_ins, {**self._stand_ins, **stand_ins}
        try:
            yield
        finally:
            self._stand_ins = before

    def for_state(self, name: str) -> torch.Tensor | str:
        """Returns what a state_dict has for a layer: its dense weight, or inside `naming` its name."""
        return name if self._naming else self.dense(name)

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Puts names of layers in place of dense weights into the state_dicts that are made inside."""
        self._naming = True
        try:
            yield
        finally:
            self._naming = False

    def mask(self, name: str) -> torch.Tensor:
        """Returns a new boolean tensor of a layer's dense shape, True where active."""
        layer = self.layers[name]
        mask = torch.zeros(layer.size, dtype=torch.bool, device=self.values.device)
        mask[self.positions_of(name).long()] = True
        return mask.view(layer.shape)

    @torch.no_grad()
    def write(self, name: str, weight: torch.Tensor) -> int:
        """Takes a layer's values from a dense weight. Returns the number of its non-zeros that are inactive here."""
        inside = weight.reshape(-1).take(self.positions_of(name).long())
        self.values_of(name).copy_(inside)
        # count_nonzero counts NaN as well.
        return int(torch.count_nonzero(weight)) - int(torch.count_nonzero(inside))

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Cuts the parameter into its layers once for a whole forward pass, so that its gradient is joined once."""
        before = self._pieces
        if self.by_layer is not None:
            self.by_layer.drop_cleared()
        if self.values.grad is None:  # a new step begins, after one that a gradient scaler may have skipped
            self.gradients.clear()
        pieces = self.values.split(self._cuts())
        self._pieces = dict(zip(self.trained, pieces, strict=False))
        try:
            yield
        finally:
            self._pieces = before

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Refuses access to dense weights, so that a tracer cannot take one for a constant."""
        self._tracing = True
        try:
            yield
        finally:
            self._tracing = False

    @torch.no_grad()
    def replace(self, positions: torch.Tensor, counts: Mapping[str, int]) -> None:
        """Sets the positions of all trained layers; the caller moves the values.

        Args:
            positions: int32 positions, each within its layer, one layer after the other, shape (active,).
            counts: new number of active weights of each trained layer, by name; at most the capacity in total.
        """
        self.positions[: len(positions)] = positions
        starts = accumulate(counts.values(), initial=0)
        for (name, count), start in zip(counts.items(), starts, strict=False):
            self.layers[name] = CompactLayer(name, self.layers[name].shape, start, count)
        self.version += 1
        if self.by_layer is not None:
            self.by_layer.follow()

    def moved(self, values: nn.Parameter) -> None:
        """Follows the parameter after its module was moved to another device or type."""
        self.values = values
        self.frozen_values = self.frozen_values.to(values)
        self.positions = self.positions.to(values.device)
        self.frozen_positions = self.frozen_positions.to(values.device)
        if self.by_layer is not None:
            self.by_layer.follow()

    def _cuts(self) -> list[int]:
        counts = [self.layers[name].count for name in self.trained]
        return [*counts, self.values.numel() - sum(counts)]

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out what belongs to one forward or backward pass, or to an optimizer."""
        left_out: dict[str, Any] = {"_pieces": None, "gradients": {}, "by_layer": None, "_stand_ins": {}}
        return {**self.__dict__, **left_out, "_tracing": False, "_naming": False}


def _check(entries: Sequence[Entry]) -> None:
    for entry in entries:
        if math.prod(entry.shape) > _MOST_POSITIONS:
            raise UsageError(
                f"weight {entry.name!r} has {math.prod(entry.shape):,} entries, and positions in compact storage have "
                f"32 bits; give --storage masked."
            )
    first = entries[0].values if entries else None
    for entry in entries:
        if first is not None and (entry.values.dtype, entry.values.device) != (first.dtype, first.device):
            one, other = (f"{values.dtype} on {values.device}" for values in (entry.values, first))
            raise UsageError(
                f"weight {entry.name!r} is {one} and {entries[0].name!r} is {other}, but compact storage holds all in "
                f"one vector; give --storage masked."
            )


def _joined(values: Sequence[torch.Tensor], entries: Sequence[Entry]) -> torch.Tensor:
    if values:
        return torch.cat([value.detach().reshape(-1) for value in values])
    return entries[0].values.new_empty(0) if entries else torch.empty(0)


def _joined_positions(positions: Iterable[torch.Tensor], values: torch.Tensor) -> torch.Tensor:
    empty = torch.empty(0, dtype=torch.int32)
    return torch.cat([empty, *(each.to("cpu", torch.int32).reshape(-1) for each in positions)]).to(values.device)
