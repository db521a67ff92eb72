"""Writing archives: every tensor by its codec, the manifest, the checksums.

`docs/format.md` describes every byte; `dsr_tool.formats.archive` reads them back.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from dsr_tool.errors import UsageError, unknown_name
from dsr_tool.files import new_file
from dsr_tool.formats.codecs import CODECS, Streams, encode_smallest
from dsr_tool.formats.coding import encode_planes
from dsr_tool.formats.manifest import (
    FORMAT_VERSION,
    GRAPH,
    MANIFEST,
    METADATA,
    PACKED,
    Entry,
    crc32_of,
    pack,
    packed_stream,
)
from dsr_tool.graph.ir import Graph
from dsr_tool.sparsity.config import ModelConfig
from dsr_tool.sparsity.layers import LayerSpec
from dsr_tool.sparsity.tensor import Array, SparseTensor

__all__ = ["ENCODINGS", "Encoded", "encode_archive", "write_archive"]

ENCODINGS = ("auto", *CODECS)


class Encoded:
    """A model encoded as an archive, not written yet."""

    def __init__(self, streams: Streams, header: Mapping[str, str]) -> None:
        """Use `encode_archive`."""
        self._streams, self._header = streams, header

    def save(self, path: Path) -> None:
        """Write it to `path` as it is; see `new_file` for doing that safely."""
        # One metadata entry, since the container's writer orders several at random.
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
    """Encode a model and write it into one file, beside the target first and renamed when whole.

    Args:
        path: the new file.
        tensors: see `encode_archive` for this and what follows.
        specs: what each of them is.
        graph: the computation.
        config: what the model is.
        encoding: `auto` or the name of a codec.
        force: replace an existing file.

    Raises:
        UsageError: unknown encoding, or a graph of another model.
        FileError: the file exists, or the disk refuses it.
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
) -> Encoded:
    """Encode a model.

    Args:
        tensors: every entry of the state_dict; full masks for those that are dense.
        specs: what each of them is.
        graph: the computation; its parameters are names of `tensors`.
        config: what the model is.
        encoding: `auto` for the smallest codec per layer, or the name of one.
        versions: names and versions of what made the file, for the record.

    Raises:
        UsageError: unknown encoding, or a graph of another model.
    """
    if encoding not in ENCODINGS:
        raise unknown_name("encoding", encoding, ENCODINGS)
    absent = [name for name in graph.parameters if name not in tensors]
    if absent:
        raise UsageError(f"graph parameter {absent[0]!r} is not among the model's tensors; trace the same model.")
    streams: Streams = {GRAPH: pack(graph.to_json())}
    entries = []
    packed: dict[str, list[Array]] = {}
    for name, tensor in tensors.items():
        codec, parts = _encode(tensor, specs[name], encoding)
        dtype = tensor.values.dtype.name
        if codec == PACKED:
            packed.setdefault(dtype, []).append(tensor.values)
        crc32 = {suffix: crc32_of(array) for suffix, array in parts.items()}
        entry = Entry(specs[name], dtype, codec, tensor.mask.active, crc32)
        entries.append(entry)
        for suffix, array in parts.items():
            if entry.stream(suffix) in streams:
                raise UsageError(f"tensor {name!r} would share the stream {entry.stream(suffix)!r}; rename the module.")
            streams[entry.stream(suffix)] = array
    # Norms that were never trained are constants, which code to nothing; a budget in bytes must not rest on that.
    groups = {dtype: encode_planes(np.concatenate(arrays), mantissas=False) for dtype, arrays in packed.items()}
    streams.update((packed_stream(dtype), group) for dtype, group in groups.items())
    manifest = {
        "schema": "dsr-tool/archive/1",
        "versions": dict(versions or {}),
        "graph_crc32": crc32_of(streams[GRAPH]),
        "packed_crc32": {dtype: crc32_of(group) for dtype, group in groups.items()},
        "model": config.to_dict(),
        "tensors": [entry.to_dict() for entry in entries],
    }
    streams[MANIFEST] = pack(json.dumps(manifest, separators=(",", ":"), allow_nan=False))
    digest = hashlib.sha256(streams[MANIFEST].tobytes()).hexdigest()
    header = {"version": ".".join(map(str, FORMAT_VERSION)), "manifest_sha256": digest}
    return Encoded(streams, header)


def _encode(tensor: SparseTensor, spec: LayerSpec, encoding: str) -> tuple[str, Streams]:
    """Codec and streams of one tensor; none for those that `auto` packs: full, and no weight by type."""
    if encoding == "auto":
        full = spec.role != "sparse" and not spec.weight and tensor.mask.active == tensor.mask.size
        return (PACKED, {}) if full else encode_smallest(tensor)
    codec = encoding if spec.role == "sparse" else "dense"
    return codec, CODECS[codec].encode(tensor)
