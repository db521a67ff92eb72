"""The archive: one file with the graph, every weight, the manifest and checksums.

The container is safetensors; `docs/format.md` describes the content so that a stranger can read it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dsr_tool.core.codecs import CODECS, SparseTensor, Streams, encode_smallest
from dsr_tool.core.config import ModelConfig
from dsr_tool.core.files import new_file, require_file
from dsr_tool.core.graph import Array, Graph
from dsr_tool.core.layers import LayerSpec
from dsr_tool.core.manifest import GRAPH, MANIFEST, METADATA, Entry, container_header_bytes, crc32_of, pack, unpack
from dsr_tool.errors import FormatError, UsageError, unknown_name

__all__ = [
    "ENCODINGS",
    "FORMAT_VERSION",
    "Archive",
    "Encoded",
    "Entry",
    "encode_archive",
    "open_archive",
    "write_archive",
]

FORMAT_VERSION = (1, 0)
ENCODINGS = ("auto", *CODECS)
MAX_DECODED_BYTES = 16 << 30


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
    for name, tensor in tensors.items():
        codec, parts = _encode(tensor, specs[name], encoding)
        crc32 = {suffix: crc32_of(array) for suffix, array in parts.items()}
        entry = Entry(specs[name], tensor.values.dtype.name, codec, tensor.mask.active, crc32)
        entries.append(entry)
        for suffix, array in parts.items():
            if entry.stream(suffix) in streams:
                raise UsageError(f"tensor {name!r} would share the stream {entry.stream(suffix)!r}; rename the module.")
            streams[entry.stream(suffix)] = array
    manifest = {
        "schema": "dsr-tool/archive/1",
        "versions": dict(versions or {}),
        "graph_crc32": crc32_of(streams[GRAPH]),
        "model": config.to_dict(),
        "tensors": [entry.to_dict() for entry in entries],
    }
    streams[MANIFEST] = pack(json.dumps(manifest, separators=(",", ":"), allow_nan=False))
    digest = hashlib.sha256(streams[MANIFEST].tobytes()).hexdigest()
    header = {"version": ".".join(map(str, FORMAT_VERSION)), "manifest_sha256": digest}
    return Encoded(streams, header)


def open_archive(path: str | Path, *, max_decoded_bytes: int = MAX_DECODED_BYTES) -> Archive:
    """Open an archive and check its header, manifest and graph; weights are decoded when asked for.

    Args:
        path: a `.dsr` file.
        max_decoded_bytes: refuse files that claim to hold more than this, decoded.

    Raises:
        FileError: there is no such file.
        FormatError: it is no archive, damaged, of a newer major version, or claims too much.
    """
    path = Path(path)
    require_file(path, "archive")
    return Archive(path, max_decoded_bytes)


class Archive:
    """An open archive.

    Attributes:
        path: where it lies.
        config: what the model is.
        graph: its computation.
        entries: every tensor of the state_dict by name, in the order of the model.
        versions: what made the file.
    """

    def __init__(self, path: Path, max_decoded_bytes: int = MAX_DECODED_BYTES) -> None:
        """Use `open_archive`."""
        self.path = path
        try:
            self._file = safe_open(path, framework="np")
        except (SafetensorError, OSError, ValueError) as error:
            raise FormatError(f"{str(path)!r} is not a dsr archive, or is cut off or damaged ({error}).") from error
        self._names = frozenset(self._file.keys())
        manifest = self._manifest()
        try:
            self.config = ModelConfig.from_dict(manifest["model"])
            entries = [Entry.from_dict(data) for data in manifest["tensors"]]
            self.versions = {str(name): str(text) for name, text in manifest["versions"].items()}
            graph_crc32 = int(manifest["graph_crc32"])
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise self._damaged(f"its manifest is not understood ({error})") from error
        self.entries = {entry.spec.name: entry for entry in entries}
        self._check_entries(entries, max_decoded_bytes)
        self.graph = Graph.from_json(unpack(self._stream(GRAPH, graph_crc32)))
        if absent := [name for name in self.graph.parameters if name not in self.entries]:
            raise self._damaged(f"its graph uses {absent[0]!r}, which it does not hold")

    @property
    def nbytes(self) -> int:
        """Size of the file in bytes."""
        return self.path.stat().st_size

    @cached_property
    def header_bytes(self) -> int:
        """Bytes of the container's own header: its length, and the table of streams."""
        return container_header_bytes(self.path)

    @cached_property
    def document_bytes(self) -> int:
        """Bytes of manifest and graph as stored."""
        return self.stored_bytes(MANIFEST) + self.stored_bytes(GRAPH)

    def entry_bytes(self, name: str) -> int:
        """Bytes of all streams of one tensor as stored."""
        entry = self.entries[name]
        return sum(self.stored_bytes(entry.stream(suffix)) for suffix in entry.crc32)

    def stored_bytes(self, stream: str) -> int:
        """Bytes of one stream of the container."""
        part = self._file.get_slice(stream)
        shape: list[int] = part.get_shape()
        return math.prod(shape) * _ITEMSIZE[str(part.get_dtype())]

    def tensor(self, name: str) -> SparseTensor:
        """Decode one tensor, bit for bit what was written.

        Raises:
            FormatError: a stream is damaged.
        """
        entry = self.entries[name]
        streams = {suffix: self._stream(entry.stream(suffix), crc) for suffix, crc in entry.crc32.items()}
        try:
            return CODECS[entry.codec].decode(streams, entry.spec.shape, entry.active, np.dtype(entry.dtype))
        except FormatError as error:
            raise self._damaged(f"tensor {name!r}: {error}") from error

    def __iter__(self) -> Iterator[tuple[str, SparseTensor]]:
        """Every tensor in turn, decoded."""
        return ((name, self.tensor(name)) for name in self.entries)

    def check(self) -> None:
        """Decode everything once; raise `FormatError` at the first damage."""
        for _ in self:
            pass

    def _manifest(self) -> dict[str, Any]:
        try:
            header = json.loads((self._file.metadata() or {})[METADATA])
            major = int(str(header["version"]).split(".", maxsplit=1)[0])
            digest = str(header["manifest_sha256"])
        except (ArithmeticError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise FormatError(
                f"{str(self.path)!r} is a safetensors file but not a dsr archive; make one with `dsr-tool export`."
            ) from error
        if major != FORMAT_VERSION[0]:
            remedy = "install a newer dsr-tool" if major > FORMAT_VERSION[0] else "export it again"
            raise FormatError(
                f"{str(self.path)!r} has format version {header['version']}; this dsr-tool reads version "
                f"{FORMAT_VERSION[0]}.x, so {remedy}."
            )
        packed = self._stream(MANIFEST, None)
        if hashlib.sha256(packed.tobytes()).hexdigest() != digest:
            raise self._damaged("the checksum of its manifest does not match")
        try:
            manifest = json.loads(unpack(packed))
        except (ValueError, RecursionError) as error:
            raise self._damaged(f"its manifest is not JSON ({error})") from error
        if not isinstance(manifest, dict):
            raise self._damaged("its manifest is not an object")
        return manifest

    def _check_entries(self, entries: list[Entry], max_decoded_bytes: int) -> None:
        expected = {MANIFEST, GRAPH} | {entry.stream(suffix) for entry in entries for suffix in entry.crc32}
        if len(self.entries) != len(entries) or expected != self._names:
            raise self._damaged("its tensors are not those that its manifest lists")
        total = sum(entry.nbytes_decoded for entry in entries)
        if total > max_decoded_bytes:
            raise FormatError(
                f"{str(self.path)!r} claims {total:,} bytes of weights, more than the {max_decoded_bytes:,} allowed; "
                f"raise max_decoded_bytes if you trust the file."
            )

    def _stream(self, name: str, crc32: int | None) -> Array:
        if name not in self._names:
            raise self._damaged(f"it has no stream {name!r}")
        try:
            array: Array = self._file.get_tensor(name)
        except (SafetensorError, TypeError, ValueError) as error:
            raise self._damaged(f"stream {name!r} cannot be read ({error})") from error
        if crc32 is not None and crc32_of(array) != crc32:
            raise self._damaged(f"the checksum of stream {name!r} does not match")
        return array

    def _damaged(self, what: str) -> FormatError:
        return FormatError(f"archive {str(self.path)!r} is damaged: {what}; export it again or fetch a whole copy.")


_ITEMSIZE = {
    **dict.fromkeys(("BOOL", "U8", "I8"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64"), 8),
}


def _encode(tensor: SparseTensor, spec: LayerSpec, encoding: str) -> tuple[str, Streams]:
    if spec.role != "sparse":
        return "dense", CODECS["dense"].encode(tensor)
    if encoding == "auto":
        return encode_smallest(tensor)
    return encoding, CODECS[encoding].encode(tensor)
