"""What is known about the channels of a graph's values while one walks through it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dsr_tool.graph.compact.channels import Channels, Ints, Units
from dsr_tool.graph.compact.products import Product
from dsr_tool.graph.ir import Graph
from dsr_tool.sparsity.tensor import Array, SparseTensor

__all__ = ["Survey"]


class Survey:
    """Channels of every value that the walk can follow.

    Attributes:
        units: groups of channels that stay or go as one.
        values: channels by name of the value.
        pinned: units that stay, since something that the walk does not understand reads them.
        products: every product with a weight that may lose channels.
        followed: nodes whose inputs and outputs may lose channels.
        sliced: constants and parameters that lose channels with a value: (node's output, name) -> (axis, channels).
        flat_shapes: values that are a shape (batch, features): name of the batch's size, and the features.
    """

    def __init__(self, graph: Graph, tensors: Mapping[str, SparseTensor]) -> None:
        """Know the inputs of the graph; `surveyed` does the rest."""
        self.graph, self.tensors, self.readers = graph, tensors, graph.users()
        self.turned: dict[str, str] = {}  # value -> the parameter that it is the transpose of
        self.batch_sizes: set[str] = set()  # values that hold the size of the batch
        self.units = Units()
        self.values: dict[str, Channels] = {}
        self.pinned: list[Ints] = []
        self.products: list[Product] = []
        self.followed: set[str] = set()
        self.sliced: dict[tuple[str, str], tuple[int, Channels]] = {}
        self.flat_shapes: dict[str, tuple[str, int]] = {}
        for value in graph.inputs:
            if len(value.shape) > 1 and value.shape[1] is not None:
                rank = len(value.shape)
                self.add(value.name, self.unknown(value.shape[1], 1 if rank > 2 else -1, rank, batch=True))

    def add(self, name: str, channels: Channels) -> bool:
        """Note the channels of a value; returns True, as rules do that follow their operator."""
        self.values[name] = channels
        return True

    def pin(self, *names: str) -> None:
        """Let all channels of these values stay."""
        self.pinned.extend(self.values[name].units for name in names if name in self.values)

    def unknown(self, count: int, axis: int, rank: int | None, *, batch: bool = False) -> Channels:
        """Channels that stay and vary."""
        channels = Channels(self.units.fresh(count), np.full(count, np.nan), axis, rank, batch)
        self.pinned.append(channels.units)
        return channels

    def owns(self, name: str) -> bool:
        """Whether a name is a parameter that one node reads, so that it can be changed."""
        return name in self.tensors and len(self.readers[name]) == 1

    def array(self, name: str) -> Array | None:
        """A constant, or a parameter of this node alone."""
        if self.owns(name):
            return self.tensors[name].to_dense()
        return self.graph.constants.get(name)
