"""Packed tensors: norms, biases and buffers, many and small, which share one stream per type.

Alone, each would pay for a name in the container and for its own Huffman tables, more than its coding saves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from dsr_tool.errors import FormatError
from dsr_tool.formats.coding import decode_planes
from dsr_tool.formats.manifest import PACKED, Entry
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import Array, SparseTensor

__all__ = ["Packed"]


class Packed:
    """Where each packed tensor lies among those of its type, which follow each other in the order of the manifest.

    Attributes:
        counts: entries of all packed tensors together, by type.
    """

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        """Place every packed one of `entries`."""
        self.counts: dict[str, int] = {}
        self._entries = {name: entry for name, entry in entries.items() if entry.codec == PACKED}
        self._starts: dict[str, int] = {}
        for name, entry in self._entries.items():
            self._starts[name] = self.counts.get(entry.dtype, 0)
            self.counts[entry.dtype] = self._starts[name] + entry.spec.size
        self._groups: dict[str, Array] = {}

    def share(self, name: str, stored: int) -> int:
        """The part of the `stored` bytes of its stream that goes to one tensor, by its entries.

        Differences of rounded running sums, so that the shares add up to the stream.
        """
        entry, start = self._entries[name], self._starts[name]
        total = max(self.counts[entry.dtype], 1)
        return stored * (start + entry.spec.size) // total - stored * start // total

    def tensor(self, name: str, stream: Callable[[str], Array]) -> SparseTensor:
        """One tensor; the first of each type decodes all of them.

        Args:
            name: of the tensor.
            stream: gives the stream of a type.

        Raises:
            FormatError: the stream is damaged.
        """
        entry, start = self._entries[name], self._starts[name]
        if entry.dtype not in self._groups:
            coded = stream(entry.dtype)
            if coded.dtype != np.uint8 or coded.ndim != 1:
                raise FormatError("packed tensors have a stream of bytes; the file is damaged.")
            self._groups[entry.dtype] = decode_planes(coded, self.counts[entry.dtype], np.dtype(entry.dtype))
        # A copy, since whoever asks may write to it.
        values = self._groups[entry.dtype][start : start + entry.spec.size].copy()
        return SparseTensor(Mask.full(entry.spec.shape), values)
