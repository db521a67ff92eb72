"""Codecs: a mask and its values to named arrays and back, pure functions with an exact inverse.

`docs/format.md` describes every byte. Sizes are exact: what `encode` returns is what lies in the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsr_tool.errors import FormatError
from dsr_tool.formats.coding import decode_planes, decode_runs, encode_planes, encode_runs
from dsr_tool.sparsity.layers import matrix_shape
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import Array, SparseTensor

__all__ = [
    "CODECS",
    "Codec",
    "Streams",
    "bitmask_bytes",
    "csr_bytes",
    "dense_bytes",
    "encode_smallest",
]

Streams = dict[str, Array]


@dataclass(frozen=True)
class Codec:
    """How one parameter lies in a file.

    Attributes:
        name: name in the manifest.
        encode: sparse tensor -> named streams.
        decode: streams, shape, active count, type -> sparse tensor; raises `FormatError` on any disagreement.
    """

    name: str
    encode: Callable[[SparseTensor], Streams]
    decode: Callable[[Mapping[str, Array], tuple[int, ...], int, np.dtype[Any]], SparseTensor]


# --- dense: every entry, zeros included; the mask beside it where some are inactive ----------------------


def _encode_dense(tensor: SparseTensor) -> Streams:
    mask = {} if tensor.mask.active == tensor.mask.size else {"mask": tensor.mask.bits}
    return {"": tensor.to_dense(), **mask}


def _decode_dense(
    streams: Mapping[str, Array], shape: tuple[int, ...], active: int, dtype: np.dtype[Any]
) -> SparseTensor:
    size = math.prod(shape)
    array, *bits = _streams(streams, "", *(("mask",) if active < size else ()))
    if array.shape != shape:
        raise FormatError(f"a dense parameter of shape {shape} came with shape {array.shape}; the file is damaged.")
    mask = Mask.from_bits(bits[0], shape) if bits else Mask.full(shape)
    tensor = SparseTensor.from_dense(array, mask)
    if bits and np.count_nonzero(array) != np.count_nonzero(tensor.values):
        raise FormatError("a dense parameter has values outside its mask; the file is damaged.")
    return _checked(mask, tensor.values, active, dtype)


# --- bitmask: one bit an entry ---------------------------------------------------------------------------


def _encode_bitmask(tensor: SparseTensor) -> Streams:
    return {"mask": tensor.mask.bits, "values": tensor.values}


def _decode_bitmask(streams: Mapping[str, Array], shape: tuple[int, ...], active: int, dtype: np.dtype) -> SparseTensor:
    bits, values = _streams(streams, "mask", "values")
    return _checked(Mask.from_bits(bits, shape), values, active, dtype)


# --- CSR: row pointers and column indices of the matrix view ---------------------------------------------


def _encode_csr(tensor: SparseTensor) -> Streams:
    rows, columns = matrix_shape(tensor.mask.shape)
    row_of, column_of = np.divmod(tensor.mask.positions, max(columns, 1))
    counts = np.bincount(row_of, minlength=rows)
    indptr = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    return {"indptr": indptr, "indices": column_of.astype(np.int32), "values": tensor.values}


def _decode_csr(streams: Mapping[str, Array], shape: tuple[int, ...], active: int, dtype: np.dtype) -> SparseTensor:
    indptr, indices, values = _streams(streams, "indptr", "indices", "values")
    rows, columns = matrix_shape(shape)
    if indptr.dtype != np.int32 or indptr.shape != (rows + 1,) or indices.dtype != np.int32 or indices.ndim != 1:
        raise FormatError(f"CSR of {rows} rows takes int32 indptr of {rows + 1} entries and int32 indices.")
    ends = indptr.astype(np.int64)
    counts = ends[1:] - ends[:-1]
    if indptr[0] != 0 or (counts < 0).any() or indptr[-1] != len(indices):
        raise FormatError("CSR indptr does not rise from 0 to the number of indices; the file is damaged.")
    if len(indices) and not (indices.min() >= 0 and indices.max() < columns):
        raise FormatError(f"CSR has a column index outside 0 to {columns - 1}; the file is damaged.")
    positions = np.repeat(np.arange(rows, dtype=np.int64) * columns, counts) + indices
    if (np.diff(positions) <= 0).any():
        raise FormatError("CSR columns of a row are not strictly increasing; the file is damaged.")
    return _checked(Mask(shape, positions), values, active, dtype)


# --- delta: run lengths and byte planes, both Huffman-coded ----------------------------------------------


def _encode_delta(tensor: SparseTensor) -> Streams:
    return {"mask": encode_runs(tensor.mask), "values": encode_planes(tensor.values)}


def _decode_delta(streams: Mapping[str, Array], shape: tuple[int, ...], active: int, dtype: np.dtype) -> SparseTensor:
    coded, planes = _streams(streams, "mask", "values")
    if coded.dtype != np.uint8 or planes.dtype != np.uint8 or coded.ndim != 1 or planes.ndim != 1:
        raise FormatError("a delta-coded parameter has streams of bytes; the file is damaged.")
    return _checked(decode_runs(coded, shape, active), decode_planes(planes, active, dtype), active, dtype)


# --- what they share -------------------------------------------------------------------------------------


def _streams(streams: Mapping[str, Array], *names: str) -> list[Array]:
    if set(streams) != set(names):
        raise FormatError(f"streams {sorted(streams)} were found where {sorted(names)} were expected.")
    return [streams[name] for name in names]


def _checked(mask: Mask, values: Array, active: int, dtype: np.dtype[Any]) -> SparseTensor:
    if mask.active != active or values.shape != (active,) or values.dtype != dtype:
        raise FormatError(
            f"a parameter of {active} active {dtype} weights came with {mask.active} positions and "
            f"{values.shape} {values.dtype} values; the file is damaged."
        )
    return SparseTensor(mask, values)


CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        Codec("delta", _encode_delta, _decode_delta),
        Codec("bitmask", _encode_bitmask, _decode_bitmask),
        Codec("csr", _encode_csr, _decode_csr),
        Codec("dense", _encode_dense, _decode_dense),
    )
}


def encode_smallest(tensor: SparseTensor) -> tuple[str, Streams]:
    """The name and streams of the codec that takes the fewest bytes for this tensor; ties go to the simpler."""
    coded = _encode_delta(tensor)
    sizes = {
        "dense": dense_bytes(tensor),
        "bitmask": bitmask_bytes(tensor),
        "csr": csr_bytes(tensor),
        "delta": sum(array.nbytes for array in coded.values()),
    }
    best = min(sizes, key=lambda name: sizes[name])
    return best, coded if best == "delta" else CODECS[best].encode(tensor)


def dense_bytes(tensor: SparseTensor) -> int:
    """Exact bytes of the dense codec: every value, and one bit an entry where some are inactive."""
    mask = 0 if tensor.mask.active == tensor.mask.size else (tensor.mask.size + 7) // 8
    return tensor.mask.size * tensor.values.dtype.itemsize + mask


def bitmask_bytes(tensor: SparseTensor) -> int:
    """Exact bytes of the bitmask codec."""
    return (tensor.mask.size + 7) // 8 + tensor.values.nbytes


def csr_bytes(tensor: SparseTensor) -> int:
    """Exact bytes of the CSR codec: int32 row pointers and column indices, and the values."""
    rows, _ = matrix_shape(tensor.mask.shape)
    return 4 * (rows + 1) + 4 * tensor.mask.active + tensor.values.nbytes
