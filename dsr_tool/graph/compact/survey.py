"""The survey of a graph: the channels of its values and the weights that connect them, filled in by `walk`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dsr_tool.graph.compact.channels import Bools, Channels, Ints, Units
from dsr_tool.graph.ir import Graph, Node
from dsr_tool.sparsity.tensor import Array, SparseTensor

__all__ = ["Product", "Survey"]


@dataclass(frozen=True, eq=False)
class Product:
    """A convolution or a matrix product with a weight.

    Attributes:
        weight: name of the parameter.
        node: the node that reads it.
        inputs_first: True if the parameter has shape (inputs, outputs), not (outputs, inputs / groups, *kernel).
        groups: number of groups of inputs and outputs that are connected only among themselves.
        absorbs: True if constant inputs can be added to the bias; zero padding and a missing bias prevent it.
        source: channels of the input.
        result: channels of the output.
        nonzero: shape (outputs, inputs / groups), True where a weight of the kernel is not zero.
    """

    weight: str
    node: Node
    inputs_first: bool
    groups: int
    absorbs: bool
    source: Channels
    result: Channels
    nonzero: Bools

    @property
    def depthwise(self) -> bool:
        """True if each group reads one channel, so that groups are removed one by one."""
        return self.groups > 1 and self.nonzero.shape[1] == 1

    def needed(self, kept: Bools) -> Bools:
        """Returns which inputs must stay, shape (inputs,), if the outputs in `kept` stay.

        Constant inputs need not stay: their share moves to the bias, or to the weights of the `anchor`.
        """
        nonzero = self.nonzero.reshape(self.groups, -1, self.nonzero.shape[1])
        used: Bools = (nonzero & kept.reshape(self.groups, -1, 1)).any(axis=1).reshape(-1)
        varies = np.isnan(self.source.constant)
        zero = self.source.constant == 0
        result = used & (varies if self.absorbs or self.anchor is not None else ~zero)
        if self.anchor is not None and (used & ~varies & ~zero).any():
            result[self.anchor] = True
        return result

    @property
    def anchor(self) -> int | None:
        """The constant input that replaces all others where a bias cannot absorb them; None if there is none."""
        # Each group would need an anchor of its own.
        if self.absorbs or self.groups > 1:
            return None
        # The largest: the weights of the others are scaled by their ratio to it, which is then at most 1.
        size = np.abs(np.nan_to_num(self.source.constant))
        return int(size.argmax()) if size.any() else None


class Survey:
    """The channels of every value that the walk can follow.

    Attributes:
        graph: the graph that is walked through.
        tensors: a tensor for each of its parameters.
        readers: the nodes that read each value.
        units: sets of channels that are kept or removed together.
        values: channels of each value, by name.
        pinned: units that must stay because an operator without a rule reads them.
        products: every product with a weight that may lose channels.
        followed: first outputs of the nodes whose inputs and outputs may lose channels.
        sliced: operands that lose channels with a value: (first output of the node, name) -> (axis, channels).
        transposed: values that are a parameter with its axes swapped -> name of the parameter.
        batch_sizes: values that hold the size of the batch.
        flat_shapes: values that are a shape (batch, features) -> name of the batch's size, and the features.
    """

    def __init__(self, graph: Graph, tensors: Mapping[str, SparseTensor]) -> None:
        self.graph, self.tensors, self.readers = graph, tensors, graph.users()
        self.units = Units()
        self.values: dict[str, Channels] = {}
        self.pinned: list[Ints] = []
        self.products: list[Product] = []
        self.followed: set[str] = set()
        self.sliced: dict[tuple[str, str], tuple[int, Channels]] = {}
        self.transposed: dict[str, str] = {}
        self.batch_sizes: set[str] = set()
        self.flat_shapes: dict[str, tuple[str, int]] = {}
        for value in graph.inputs:
            if len(value.shape) > 1 and value.shape[1] is not None:
                # The caller gives the inputs, so all their channels stay.
                rank = len(value.shape)
                self.add(value.name, self.pinned_channels(value.shape[1], 1 if rank > 2 else -1, rank, batch=True))

    def add(self, name: str, channels: Channels) -> bool:
        """Sets the channels of a value; returns True, as a rule does that follows its node."""
        self.values[name] = channels
        return True

    def pin(self, *names: str) -> None:
        """Pins all channels of these values."""
        self.pinned.extend(self.values[name].units for name in names if name in self.values)

    def pinned_channels(self, count: int, axis: int, rank: int | None, *, batch: bool = False) -> Channels:
        """Returns new channels that stay and vary."""
        channels = Channels(self.units.fresh(count), np.full(count, np.nan), axis, rank, batch)
        self.pinned.append(channels.units)
        return channels

    def owns(self, name: str) -> bool:
        """Returns whether `name` is a parameter that only one node reads, so that it may be changed."""
        return name in self.tensors and len(self.readers[name]) == 1

    def array(self, name: str) -> Array | None:
        """Returns a constant, or a parameter that only one node reads; None for any other value."""
        if self.owns(name):
            return self.tensors[name].to_dense()
        return self.graph.constants.get(name)
