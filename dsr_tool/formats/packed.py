"""Reader of packed tensors: norms, biases and buffers, many and small, which share one stream per dtype.

Each alone would need a name in the header and Huffman tables of its own, which cost more than coding saves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from dsr_tool.formats.coding import decode_planes
from dsr_tool.formats.manifest import PACKED, Entry
from dsr_tool.formats.streams import require_bytes
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import Array, SparseTensor

__all__ = ["PackedTensors"]


class PackedTensors:
    """The packed tensors of an archive. In the stream of their dtype they follow each other in manifest order.

    Attributes:
        counts: number of entries of all packed tensors together, by dtype.
    """

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        """Computes the offset of each packed tensor among `entries`, the tensors of the manifest."""
        self.counts: dict[str, int] = {}
        self._entries = {name: entry for name, entry in entries.items() if entry.codec == PACKED}
        self._offsets: dict[str, int] = {}
        for name, entry in self._entries.items():
            self._offsets[name] = self.counts.get(entry.dtype, 0)
            self.counts[entry.dtype] = self._offsets[name] + entry.spec.size
        self._decoded: dict[str, Array] = {}

    def stored_bytes(self, name: str, stream_bytes: int) -> int:
        """Returns the share of one tensor in the `stream_bytes` of its stream, in proportion to its entries.

        Shares are differences of rounded running sums, so they add up to the stream exactly.
        """
        entry, offset = self._entries[name], self._offsets[name]
        total = max(self.counts[entry.dtype], 1)
        return stream_bytes * (offset + entry.spec.size) // total - stream_bytes * offset // total

    def tensor(self, name: str, read_stream: Callable[[str], Array]) -> SparseTensor:
        """Returns one tensor. The first of each dtype decodes the whole stream; the others reuse it.

        Args:
            name: name of the tensor.
            read_stream: returns the stream of a dtype.

        Raises:
            FormatError: the stream is damaged.
        """
        entry, offset = self._entries[name], self._offsets[name]
        if entry.dtype not in self._decoded:
            stream = read_stream(entry.dtype)
            require_bytes("packed tensors", stream)
            self._decoded[entry.dtype] = decode_planes(stream, self.counts[entry.dtype], np.dtype(entry.dtype))
        # A copy, because the caller may write to it.
        values = self._decoded[entry.dtype][offset : offset + entry.spec.size].copy()
        return SparseTensor(Mask.full(entry.spec.shape), values)
