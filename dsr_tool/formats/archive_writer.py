"""Writer of archives: encodes every tensor, and adds the graph, the manifest and the checksums.

`docs/format.md` describes every byte; `dsr_tool.formats.archive` is the reader.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from dsr_tool.errors import UsageError, unknown_name
from dsr_tool.files import new_file
from dsr_tool.formats.codecs import CODECS, encode_smallest
from dsr_tool.formats.coding import encode_planes
from dsr_tool.formats.documents import compress_document
from dsr_tool.formats.grid import encode_smallest_grid
from dsr_tool.formats.manifest import (
    FORMAT_VERSION,
    GRAPH,
    MANIFEST,
    METADATA,
    PACKED,
    Entry,
    crc32_of,
    packed_stream,
)
from dsr_tool.formats.palette import encode_palette, least_palette_bytes
from dsr_tool.formats.streams import Streams, stream_bytes
from dsr_tool.graph.ir import Graph
from dsr_tool.sparsity.config import ModelConfig
from dsr_tool.sparsity.grid import GridTensor
from dsr_tool.sparsity.layers import LayerSpec
from dsr_tool.sparsity.tensor import Array, SparseTensor

__all__ = ["ENCODINGS", "EncodedArchive", "encode_archive", "write_archive"]

ENCODINGS = ("auto", *CODECS)
"""Values of `--encoding` for archives: the smallest codec for each layer, or one codec for all sparse weights."""


_STREAM_ENTRY_BYTES = 75
"""Bytes of header and manifest per stream, beside the name of its tensor: 71 on average in an archive of 50 biases of
2,000 entries, and a few more where offsets have more digits."""


class EncodedArchive:
    """An archive in memory: its streams and its metadata."""

    def __init__(self, streams: Streams, header: Mapping[str, str]) -> None:
        """Holds the parts; `encode_archive` makes them."""
        self._streams, self._header = streams, header

    def save(self, path: Path) -> None:
        """Writes the file to `path` directly; `new_file` gives a path that is renamed when the file is complete."""
        # safetensors orders several metadata entries at random, so the archive has one, which is itself JSON.
        save_file(self._streams, path, metadata={METADATA: json.dumps(self._header)})


def write_archive(
    path: Path,
    tensors: Mapping[str, SparseTensor],
    specs: Mapping[str, LayerSpec],
    graph: Graph,
    config: ModelConfig,
    *,
    encoding: str = "auto",
    force: bool = False,
) -> None:
    """Encodes a model and writes it to a file, under a temporary name until it is complete.

    Args:
        path: the new file.
        tensors: see `encode_archive` for this and the next arguments.
        specs: name, shape and role of each tensor.
        graph: the computation.
        config: description of the model.
        encoding: `auto` or the name of a codec.
        force: whether to replace an existing file.

    Raises:
        UsageError: the encoding is unknown, or the graph is of another model.
        FileError: the file exists, or writing fails.
    """
    encoded = encode_archive(tensors, specs, graph, config, encoding=encoding)
    with new_file(path, force=force) as part:
        encoded.save(part)


def encode_archive(
    tensors: Mapping[str, SparseTensor],
    specs: Mapping[str, LayerSpec],
    graph: Graph,
    config: ModelConfig,
    *,
    encoding: str = "auto",
    versions: Mapping[str, str] | None = None,
) -> EncodedArchive:
    """Encodes a model.

    Args:
        tensors: every entry of the state_dict, with full masks for dense ones.
        specs: name, shape and role of each tensor.
        graph: the computation; its parameters are names of `tensors`.
        config: description of the model.
        encoding: `auto` for the smallest codec per layer, or the name of one for all sparse weights.
        versions: names and versions of the packages that write the file, for the record.

    Raises:
        UsageError: the encoding is unknown or cannot hold a weight, the graph is of another model, or a name collides
            with another stream.
    """
    if encoding != "auto" and encoding not in CODECS:
        raise unknown_name("encoding", encoding, ("auto", *CODECS))
    if absent := [name for name in graph.parameters if name not in tensors]:
        raise UsageError(f"graph parameter {absent[0]!r} is not among the model's tensors; trace the same model.")
    entries: list[Entry] = []
    streams: Streams = {}
    packed: dict[str, list[Array]] = {}
    for name, tensor in tensors.items():
        codec, parts = _encode(tensor, specs[name], encoding)
        dtype = tensor.values.dtype.name
        if codec == PACKED:
            packed.setdefault(dtype, []).append(tensor.values)
        entry = Entry(specs[name], dtype, codec, tensor.mask.active, {key: crc32_of(a) for key, a in parts.items()})
        entries.append(entry)
        for suffix, array in parts.items():
            _add(streams, entry.stream(suffix), array, name)
    # Last, because the packed tensors are known only now.
    for name, array in _shared_streams(graph, packed):
        _add(streams, name, array, name)
    manifest = {
        "schema": "dsr-tool/archive/1",
        "versions": dict(versions or {}),
        "graph_crc32": crc32_of(streams[GRAPH]),
        "packed_crc32": {dtype: crc32_of(streams[packed_stream(dtype)]) for dtype in packed},
        "model": config.to_dict(),
        "tensors": [entry.to_dict() for entry in entries],
    }
    # NaN is not JSON, and other readers refuse it.
    document = compress_document(json.dumps(manifest, separators=(",", ":"), allow_nan=False))
    _add(streams, MANIFEST, document, MANIFEST)
    digest = hashlib.sha256(document.tobytes()).hexdigest()
    return EncodedArchive(streams, {"version": ".".join(map(str, FORMAT_VERSION)), "manifest_sha256": digest})


def _encode(tensor: SparseTensor, spec: LayerSpec, encoding: str) -> tuple[str, Streams]:
    """Returns codec and streams of one tensor. `auto` packs full tensors that are not weights by type: no streams."""
    if isinstance(tensor, GridTensor):
        return encode_smallest_grid(tensor)
    if encoding == "auto":
        if spec.role == "sparse" or spec.weight or tensor.mask.active < tensor.mask.size:
            return encode_smallest(tensor)
        palette = _palette_instead_of_packing(tensor, spec)
        return ("palette", palette) if palette else (PACKED, {})
    # A named codec is for sparse weights, and would make norms and biases larger; palettes are for every weight.
    codec = encoding if spec.role == "sparse" or (encoding == "palette" and spec.weight) else "dense"
    if not CODECS[codec].fits(tensor):
        raise UsageError(
            f"--encoding {codec!r} is for {CODECS[codec].good_for}, and weight {spec.name!r} has none; use --encoding "
            f"auto."
        )
    return codec, CODECS[codec].encode(tensor)


def _palette_instead_of_packing(tensor: SparseTensor, spec: LayerSpec) -> Streams | None:
    """Returns the palette of a norm, bias or buffer if it is smaller than packing, names of streams included."""
    values = tensor.values
    # A constant is what an untrained norm is, and a budget in bytes must hold after training as well.
    if values.dtype.kind != "f" or not values.size or values.tobytes() == values[:1].tobytes() * values.size:
        return None
    packed = encode_planes(values, mantissas=False).nbytes
    if least_palette_bytes(tensor) > packed:
        return None
    streams = encode_palette(tensor)
    names = len(streams) * (_STREAM_ENTRY_BYTES + len(spec.name))
    return streams if stream_bytes(streams) + names < packed else None


def _shared_streams(graph: Graph, packed: Mapping[str, list[Array]]) -> Iterator[tuple[str, Array]]:
    """Yields the graph, and the values of all packed tensors of each dtype one after the other."""
    yield GRAPH, compress_document(graph.to_json())
    for dtype, values in packed.items():
        # Untrained norms are constants that code to nothing, but a budget in bytes must hold after training as well.
        yield packed_stream(dtype), encode_planes(np.concatenate(values), mantissas=False)


def _add(streams: Streams, name: str, array: Array, tensor: str) -> None:
    if name in streams:
        raise UsageError(f"tensor {tensor!r} would share the stream {name!r}; rename the module.")
    streams[name] = array
