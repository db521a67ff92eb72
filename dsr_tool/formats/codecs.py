"""The table of codecs: each turns a mask and its values into named arrays, and back, bit for bit.

A new codec is one entry of `CODECS`. The archive, its manifest, the `--encoding` option, the footprint and the report
read the table. `docs/format.md` describes every byte.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsr_tool.errors import FormatError
from dsr_tool.formats.coding import decode_planes, decode_runs, encode_planes, encode_runs
from dsr_tool.formats.grid import GRIDS
from dsr_tool.formats.groups import decode_nm, encode_nm, is_nm
from dsr_tool.formats.palette import decode_palette, encode_palette, least_palette_bytes
from dsr_tool.formats.streams import Streams, checked, exact_streams, require_bytes, stream_bytes
from dsr_tool.sparsity.layers import matrix_shape
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import Array, SparseTensor

__all__ = [
    "CODECS",
    "VALUE_SUFFIXES",
    "Codec",
    "Column",
    "Streams",
    "column_bytes",
    "decoder_of",
    "encode_smallest",
    "is_codec",
    "size_columns",
]

VALUE_SUFFIXES = ("", "values", "table", "indices", "codes", "scales")
"""Suffixes of streams with values. Streams with any other suffix hold positions, by which reports tell both apart."""


Decode = Callable[[Mapping[str, Array], tuple[int, ...], int, np.dtype[Any]], SparseTensor]


@dataclass(frozen=True)
class Column:
    """The column of reports with the bytes that a codec needs for a model.

    Attributes:
        name: header in tables and, in lower case and followed by `_bytes`, the key in JSON.
        label: header for readers of a page, who need not know the codec.
    """

    name: str
    label: str

    @property
    def key(self) -> str:
        """Key in JSON, such as `csr_bytes`."""
        return f"{self.name.lower()}_bytes"


@dataclass(frozen=True)
class Codec:
    """One way to store a tensor in a file.

    Attributes:
        name: name in the manifest and of `--encoding`.
        good_for: the tensors for which it is the smallest, as `docs/format.md` says it.
        encode: returns the streams of a tensor.
        decode: returns the tensor of streams, shape, number of active entries and dtype. Raises `FormatError` if they
            disagree in any way: streams come from untrusted files.
        size: returns the bytes of the streams without making them; None if only encoding tells.
        column: column in reports, which codecs may share; None if reports show it otherwise.
        least: returns a quick lower bound of the bytes, by which a writer can skip the encoding; None without one.
        fits: returns whether the codec can hold a tensor; most hold any.
    """

    name: str
    good_for: str
    encode: Callable[[SparseTensor], Streams]
    decode: Decode
    size: Callable[[SparseTensor], int] | None = None
    column: Column | None = None
    least: Callable[[SparseTensor], int] | None = None
    fits: Callable[[SparseTensor], bool] = lambda _: True

    def nbytes(self, tensor: SparseTensor) -> int:
        """Returns the exact bytes of the streams that `encode` returns for a tensor."""
        return self.size(tensor) if self.size else stream_bytes(self.encode(tensor))


# --- dense: every entry, and a bitmask beside it if some are inactive ------------------------------------


def _encode_dense(tensor: SparseTensor) -> Streams:
    mask = {} if tensor.mask.active == tensor.mask.size else {"mask": tensor.mask.bits}
    return {"": tensor.to_dense(), **mask}


def _decode_dense(
    streams: Mapping[str, Array], shape: tuple[int, ...], active: int, dtype: np.dtype[Any]
) -> SparseTensor:
    array, *bits = exact_streams(streams, "", *(("mask",) if active < math.prod(shape) else ()))
    if array.shape != shape:
        raise FormatError(
            f"a dense parameter of shape {shape} is stored with shape {array.shape}; the file is damaged."
        )
    mask = Mask.from_bits(bits[0], shape) if bits else Mask.full(shape)
    tensor = SparseTensor.from_dense(array, mask)
    # Readers that ignore the mask would compute with a stray value, so the archive would mean two models.
    if bits and np.count_nonzero(array) != np.count_nonzero(tensor.values):
        raise FormatError("a dense parameter has non-zero values outside its mask; the file is damaged.")
    return checked(mask, tensor.values, active, dtype)


def _dense_size(tensor: SparseTensor) -> int:
    mask = 0 if tensor.mask.active == tensor.mask.size else _bitmask_bytes(tensor)
    return tensor.mask.size * tensor.values.dtype.itemsize + mask


# --- bitmask: one bit per entry --------------------------------------------------------------------------


def _encode_bitmask(tensor: SparseTensor) -> Streams:
    return {"mask": tensor.mask.bits, "values": tensor.values}


def _decode_bitmask(
    streams: Mapping[str, Array], shape: tuple[int, ...], active: int, dtype: np.dtype[Any]
) -> SparseTensor:
    bits, values = exact_streams(streams, "mask", "values")
    return checked(Mask.from_bits(bits, shape), values, active, dtype)


def _bitmask_size(tensor: SparseTensor) -> int:
    return _bitmask_bytes(tensor) + tensor.values.nbytes


def _bitmask_bytes(tensor: SparseTensor) -> int:
    return (tensor.mask.size + 7) // 8


# --- CSR: row pointers and column indices of the matrix view ---------------------------------------------


def _encode_csr(tensor: SparseTensor) -> Streams:
    rows, columns = matrix_shape(tensor.mask.shape)
    row_of, column_of = np.divmod(tensor.mask.positions, max(columns, 1))
    counts = np.bincount(row_of, minlength=rows)
    indptr = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    # int32 takes half the bytes of int64, and scipy computes with it as it is.
    return {"indptr": indptr, "indices": column_of.astype(np.int32), "values": tensor.values}


def _decode_csr(
    streams: Mapping[str, Array], shape: tuple[int, ...], active: int, dtype: np.dtype[Any]
) -> SparseTensor:
    indptr, indices, values = exact_streams(streams, "indptr", "indices", "values")
    rows, columns = matrix_shape(shape)
    if indptr.dtype != np.int32 or indptr.shape != (rows + 1,) or indices.dtype != np.int32 or indices.ndim != 1:
        raise FormatError(f"CSR of {rows} rows needs {rows + 1} int32 row pointers and int32 column indices.")
    # A difference of two int32 numbers can wrap around to a positive one, so subtract in int64.
    ends = indptr.astype(np.int64)
    counts = ends[1:] - ends[:-1]
    if indptr[0] != 0 or (counts < 0).any() or indptr[-1] != len(indices):
        raise FormatError("CSR row pointers do not rise from 0 to the number of indices; the file is damaged.")
    if len(indices) and not (indices.min() >= 0 and indices.max() < columns):
        raise FormatError(f"CSR has a column index outside 0 to {columns - 1}; the file is damaged.")
    # One difference checks the order within rows: from row to row positions rise anyway.
    positions = np.repeat(np.arange(rows, dtype=np.int64) * columns, counts) + indices
    if (np.diff(positions) <= 0).any():
        raise FormatError("CSR columns of a row are not strictly increasing; the file is damaged.")
    return checked(Mask(shape, positions), values, active, dtype)


def _csr_size(tensor: SparseTensor) -> int:
    rows, _ = matrix_shape(tensor.mask.shape)
    return 4 * (rows + 1) + 4 * tensor.mask.active + tensor.values.nbytes


# --- delta: run lengths and byte planes, both Huffman-coded ----------------------------------------------


def _encode_delta(tensor: SparseTensor) -> Streams:
    return {"mask": encode_runs(tensor.mask), "values": encode_planes(tensor.values)}


def _decode_delta(
    streams: Mapping[str, Array], shape: tuple[int, ...], active: int, dtype: np.dtype[Any]
) -> SparseTensor:
    runs, planes = exact_streams(streams, "mask", "values")
    require_bytes("a delta-coded parameter", runs, planes)
    return checked(decode_runs(runs, shape, active), decode_planes(planes, active, dtype), active, dtype)


_CODED = Column("coded", "Coded, as in an archive")

# --- the table -------------------------------------------------------------------------------------------

CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        Codec("dense", "tensors with few zeros", _encode_dense, _decode_dense, _dense_size),
        Codec(
            "bitmask",
            "weights that are about half zeros, with values that do not compress",
            _encode_bitmask,
            _decode_bitmask,
            _bitmask_size,
            Column("bitmask", "Bitmask"),
        ),
        Codec(
            "csr",
            "weights with very few active entries and few rows; scipy reads its arrays",
            _encode_csr,
            _decode_csr,
            _csr_size,
            Column("CSR", "CSR, 32-bit indices"),
        ),
        Codec(
            "delta",
            "most sparse weights: within 2 % of the entropy of the mask",
            _encode_delta,
            _decode_delta,
            column=_CODED,
        ),
        Codec(
            "palette",
            "weights with few distinct values, as those that other tools quantised",
            encode_palette,
            decode_palette,
            least=least_palette_bytes,
        ),
        Codec("nm", "weights with a mask N:M, such as 2:4", encode_nm, decode_nm, column=_CODED, fits=is_nm),
    )
}
"""Codecs by name, from the simplest to the most elaborate: of two equally small ones the writer takes the earlier."""


def is_codec(name: str) -> bool:
    """Returns whether a manifest may name this codec.

    Grids have codecs that are no choice of a writer: a tensor on a grid has one of them, and no other.
    """
    return name in GRIDS or name in CODECS


def decoder_of(name: str) -> Decode:
    """Returns what decodes the streams of a codec; `is_codec` tells which there are."""
    return GRIDS[name] if name in GRIDS else CODECS[name].decode


def encode_smallest(tensor: SparseTensor, codecs: Mapping[str, Codec] = CODECS) -> tuple[str, Streams]:
    """Encodes a tensor with the codec that needs the fewest bytes; on a tie with the one that `codecs` lists first.

    Returns:
        Name of the codec, and the streams.
    """
    # Sizes that only encoding tells are the slow ones, so they come last, and their streams are kept.
    fitting = [name for name in codecs if codecs[name].fits(tensor)]
    order = sorted(fitting, key=lambda name: (codecs[name].size is None, codecs[name].least is not None))
    sizes: dict[str, int] = {}
    encoded: dict[str, Streams] = {}
    for name in order:
        codec = codecs[name]
        if codec.least and codec.least(tensor) > min(sizes.values(), default=math.inf):
            continue
        if codec.size:
            sizes[name] = codec.size(tensor)
        else:
            encoded[name] = codec.encode(tensor)
            sizes[name] = stream_bytes(encoded[name])
    best = min((name for name in codecs if name in sizes), key=sizes.__getitem__)
    return best, encoded[best] if best in encoded else codecs[best].encode(tensor)


def size_columns(codecs: Mapping[str, Codec] = CODECS) -> dict[str, Column]:
    """Returns the columns of reports by the first codec of each, sorted by the name of the column."""
    first: dict[Column, str] = {}
    for name, codec in codecs.items():
        if codec.column:
            first.setdefault(codec.column, name)
    return {name: column for column, name in sorted(first.items(), key=lambda item: item[0].name)}


def column_bytes(tensor: SparseTensor, codecs: Mapping[str, Codec] = CODECS) -> dict[str, int]:
    """Returns the bytes of a tensor in each column of reports, those of its smallest codec, by the column's first."""
    return {
        first: min(one.nbytes(tensor) for one in codecs.values() if one.column == column and one.fits(tensor))
        for first, column in size_columns(codecs).items()
    }
