"""Values that are known before a graph runs: weights, constants, and what is computed from them alone."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from dsr_tool.graph.ir import Node
from dsr_tool.runtime.reference.interpreter import dense_bytes
from dsr_tool.sparsity.at_rest import dtype_of
from dsr_tool.sparsity.grid import GridTensor
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import Array, SparseTensor, Weight, dense

__all__ = ["Constants", "as_sparse", "entries_of", "is_packable", "reshaped", "shape_of"]

_MAX_ENTRIES = 1 << 31
"""Largest dense size of a weight: record keys are int32."""

_LARGEST_CODE = 127
"""Largest code of a grid of 8 bits."""


class Constants:
    """Known values by name. Some matrices are the transpose of another one, which is not computed until it is needed.

    Exporters write a linear layer as a product with a transposed weight, while the kernels take the weight as it is
    stored; `transposed_source` gives them that.
    """

    def __init__(self, values: Mapping[str, Weight]) -> None:
        self._values = dict(values)
        self._transposes: dict[str, str] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._values or name in self._transposes

    def get(self, name: str) -> Weight | None:
        """Returns a value as the graph means it, sparse if it is stored so; None if it is not known."""
        if name in self._transposes:
            # Computed on demand: the kernels ask for the source, and only a fallback needs the transpose itself.
            transpose: Array = dense(self._values[self._transposes[name]]).T
            return transpose
        return self._values.get(name)

    def dense(self, name: str) -> Array:
        """Returns a known value as an array, zeros included."""
        value = self.get(name)
        if value is None:
            raise KeyError(name)
        return dense(value)

    def transposed_source(self, name: str) -> SparseTensor | None:
        """Returns the stored matrix of which `name` is the transpose; None if it is not one."""
        source = self._values.get(self._transposes.get(name, ""))
        return source if isinstance(source, SparseTensor) else None

    def of_node(self, node: Node) -> dict[str, Weight]:
        """Returns those inputs of a node that are known, by name."""
        return {name: value for name in node.inputs if name and (value := self.get(name)) is not None}

    def add(self, values: Mapping[str, Weight]) -> None:
        """Adds values, such as the outputs of a node that was computed from known ones."""
        self._values.update(values)

    def add_transpose(self, name: str, source: str) -> bool:
        """Adds a matrix as the transpose of a stored sparse one. Returns False if the source is not such a matrix."""
        # A dense matrix is transposed by the reference, which costs nothing: the result is a view.
        weight = self._values.get(source)
        if not isinstance(weight, SparseTensor) or len(weight.mask.shape) != 2:
            return False
        self._transposes[name] = source
        return True

    @property
    def nbytes(self) -> int:
        """Bytes of all stored values with their zeros."""
        return sum(map(dense_bytes, self._values.values()))


def shape_of(weight: Weight) -> tuple[int, ...]:
    """Returns the shape of a weight, sparse or not."""
    return weight.mask.shape if isinstance(weight, SparseTensor) else weight.shape


def as_sparse(weight: Weight) -> SparseTensor:
    """Returns a weight as a sparse tensor; of an array, the entries that are not zero are active."""
    if isinstance(weight, SparseTensor):
        return weight
    return SparseTensor.from_dense(weight, Mask.from_bool(weight != 0))


def reshaped(weight: SparseTensor, shape: tuple[int, ...]) -> SparseTensor:
    """Returns a weight in another shape of as many rows and entries; a grid stays one."""
    mask = weight.mask.reshaped(shape)
    if isinstance(weight, GridTensor):
        return GridTensor(mask, weight.codes, weight.scales)
    return SparseTensor(mask, weight.values)


def entries_of(weight: SparseTensor) -> tuple[SparseTensor, Array | None]:
    """Returns the numbers that kernels multiply by, and the scale of each row: of a grid its codes, int8.

    Other weights are their values, float32, without scales; so is a grid whose values may overflow.
    """
    if isinstance(weight, GridTensor) and np.isfinite(weight.scales * np.float32(_LARGEST_CODE)).all():
        return SparseTensor(weight.mask, weight.codes), np.ascontiguousarray(weight.scales, np.float32)
    return weight, None


def is_packable(weight: Weight) -> bool:
    """Returns whether the kernels can multiply by a weight: float32, not empty, and small enough for int32 keys."""
    # Constants of a graph may be integers; weights stored as float16 were converted when the session was opened.
    return dtype_of(weight) == np.float32 and 0 < math.prod(shape_of(weight)) < _MAX_ENTRIES
