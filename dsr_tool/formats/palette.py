"""Palettes: the distinct values of a tensor in a table, and for each active entry its index in the table.

Networks whose weights were shared or quantised by other tools have few distinct values: an index then takes 4 to 8
bits, and every bit of the weights is kept. `docs/format.md` describes every byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from dsr_tool.errors import FormatError
from dsr_tool.formats.coding import decode_planes, decode_runs, encode_planes, encode_runs
from dsr_tool.formats.streams import Streams, checked, exact_streams, require_bytes
from dsr_tool.sparsity.tensor import Array, SparseTensor

__all__ = ["decode_palette", "encode_palette", "least_palette_bytes"]

_Bits = npt.NDArray[np.unsignedinteger[Any]]


def encode_palette(tensor: SparseTensor) -> Streams:
    """Returns the runs of the mask, the table of distinct values, and the planes of the indices."""
    bits = _bits(tensor.values)
    table = _distinct(bits)
    indices = np.searchsorted(table, bits).astype(_index_type(len(table)))
    return {
        "mask": encode_runs(tensor.mask),
        "table": table.view(tensor.values.dtype),
        "indices": encode_planes(indices),
    }


def decode_palette(
    streams: Mapping[str, Array], shape: tuple[int, ...], active: int, dtype: np.dtype[Any]
) -> SparseTensor:
    """Returns the tensor of its streams, the inverse of `encode_palette`.

    Raises:
        FormatError: the table is of another type, has too many entries or is not in order, or an index lies past it.
    """
    runs, table, planes = exact_streams(streams, "mask", "table", "indices")
    require_bytes("a parameter with a palette", runs, planes)
    if table.dtype != dtype or table.ndim != 1 or not min(active, 1) <= len(table) <= active:
        raise FormatError(
            f"a palette has shape {table.shape} and type {table.dtype} where up to {active} values of type {dtype} "
            f"were expected; the file is damaged."
        )
    bits = _bits(table)
    # One order and no repetition: a tensor has one palette, so equal tensors have equal bytes.
    if (bits[1:] <= bits[:-1]).any():
        raise FormatError("the values of a palette do not increase strictly; the file is damaged.")
    mask = decode_runs(runs, shape, active)
    indices = decode_planes(planes, active, _index_type(len(table)))
    if indices.max(initial=0) >= max(len(table), 1):
        raise FormatError(f"an index lies past the {len(table)} values of its palette; the file is damaged.")
    return checked(mask, table[indices], active, dtype)


def least_palette_bytes(tensor: SparseTensor) -> int:
    """Returns a lower bound of the streams' bytes: the table, and one bit per entry for each plane of the indices."""
    distinct = len(_distinct(_bits(tensor.values)))
    width = _index_type(distinct).itemsize
    # A Huffman code has at least one bit per symbol.
    return distinct * tensor.values.itemsize + width * (tensor.mask.active // 8)


def _bits(values: Array) -> _Bits:
    """Returns values as unsigned integers of their bits, which tell -0 from 0 and one NaN from another."""
    return np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")


def _distinct(bits: _Bits) -> _Bits:
    # numpy sorts two million integers in 7 ms; its unique() takes 1.5 s for the same.
    ordered = np.sort(bits)
    return ordered[np.concatenate(([True], ordered[1:] != ordered[:-1]))] if len(ordered) else ordered


def _index_type(length: int) -> np.dtype[Any]:
    """Returns the smallest unsigned type of the indices of a table."""
    return np.dtype(np.uint8 if length <= 1 << 8 else np.uint16 if length <= 1 << 16 else np.uint32)
