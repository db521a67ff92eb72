"""Weights and constants by name, with transposed ones that are made when somebody asks for their entries."""

from __future__ import annotations

from typing import Any

from dsr_tool.sparsity.tensor import SparseTensor, Weight, dense

__all__ = ["Known"]


class Known(dict[str, Weight]):
    """A dictionary in which some matrices are others with their axes swapped.

    Linear layers are exported as products by a transposed weight, and the kernels take the weight as it is stored.
    """

    def __init__(self, values: dict[str, Weight]) -> None:
        super().__init__(values)
        self._source: dict[str, str] = {}

    def swap(self, source: str, name: str) -> None:
        """Let `name` be the matrix `source` with its axes swapped."""
        self._source[name] = source
        super().__setitem__(name, super().__getitem__(source))

    def swapped(self, name: str) -> SparseTensor | None:
        """The matrix whose axes were swapped to make this one."""
        weight = super().get(self._source.get(name, ""))
        return weight if isinstance(weight, SparseTensor) else None

    def __getitem__(self, name: str) -> Weight:
        if name not in self._source:
            return super().__getitem__(name)
        swapped: Weight = dense(super().__getitem__(self._source[name])).T
        return swapped

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a name, or the default."""
        try:
            return self[name]
        except KeyError:
            return default
