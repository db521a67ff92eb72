"""Reader of archives: one file with the graph, every weight, the manifest and checksums.

An archive is a safetensors file; `docs/format.md` describes its content, so that others can write a reader. Archives
may come from strangers: whatever the bytes are, reading ends in tensors or in a `FormatError`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dsr_tool.errors import FileError, FormatError
from dsr_tool.files import require_file
from dsr_tool.formats.archive_writer import ENCODINGS, EncodedArchive, encode_archive, write_archive
from dsr_tool.formats.codecs import decoder_of
from dsr_tool.formats.documents import decompress_document, is_count, parse_json
from dsr_tool.formats.manifest import (
    FORMAT_VERSION,
    GRAPH,
    MANIFEST,
    METADATA,
    PACKED,
    Entry,
    check_decoded_bytes,
    crc32_of,
    packed_stream,
)
from dsr_tool.formats.packed import PackedTensors
from dsr_tool.formats.tensor_file import TensorFile
from dsr_tool.graph.ir import Graph
from dsr_tool.sparsity.config import ModelConfig
from dsr_tool.sparsity.tensor import Array, SparseTensor

__all__ = [
    "ENCODINGS",
    "FORMAT_VERSION",
    "Archive",
    "EncodedArchive",
    "Entry",
    "encode_archive",
    "open_archive",
    "write_archive",
]

_ALIGNMENT = 64
"""Entries to which `Archive.dense` aligns the start of each tensor: no two tensors share a cache line."""


def open_archive(path: str | Path, *, max_decoded_bytes: int | None = None) -> Archive:
    """Opens an archive and checks its header, manifest and graph. Weights are decoded when they are asked for.

    Args:
        path: a `.dsr` file.
        max_decoded_bytes: largest decoded size that the file may claim. Default: 10,000 times the size of the file plus
            256 MiB, and at most 16 GiB.

    Raises:
        FileError: the file does not exist or cannot be read.
        FormatError: the file is not an archive, is damaged, has a newer major version, or claims too much.
    """
    path = Path(path)
    require_file(path, "archive")
    return Archive(path, max_decoded_bytes)


class Archive:
    """An open archive.

    Attributes:
        path: path of the file.
        config: description of the model.
        graph: its computation.
        entries: every tensor of the state_dict by name, in the order of the model.
        versions: names and versions of the packages that wrote the file.
    """

    def __init__(self, path: Path, max_decoded_bytes: int | None = None) -> None:
        """Reads header, manifest and graph; see `open_archive`."""
        self.path = path
        try:
            self._file = TensorFile(path)
        except OSError as error:
            raise FileError(f"archive {str(path)!r} cannot be read: {error.strerror or error}.") from error
        except FormatError as error:
            raise FormatError(f"{str(path)!r} is not a dsr archive, or is cut off or damaged ({error}).") from error
        manifest = self._manifest(self._manifest_digest())
        # JSON of any shape can get here, so every error of indexing or conversion means a damaged manifest.
        try:
            self.config = ModelConfig.from_dict(manifest["model"])
            entries = [Entry.from_dict(data) for data in manifest["tensors"]]
            self.versions = {str(name): str(text) for name, text in manifest["versions"].items()}
            graph_crc32 = manifest["graph_crc32"]
            self._packed_crc32: dict[str, int] = dict(manifest["packed_crc32"])
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise self._damaged(f"its manifest is invalid ({error})") from error
        if not all(map(is_count, (graph_crc32, *self._packed_crc32.values()))):
            raise self._damaged("its manifest is invalid (a checksum is not an integer of at least 0)")
        self.entries = {entry.spec.name: entry for entry in entries}
        self._packed = PackedTensors(self.entries)
        self._check_streams(entries)
        # Before the graph is read and anything is allocated for tensors.
        check_decoded_bytes(path, entries, self.nbytes, max_decoded_bytes)
        self.graph = self._read_graph(graph_crc32)
        if absent := [name for name in self.graph.parameters if name not in self.entries]:
            raise self._damaged(f"its graph uses parameter {absent[0]!r}, which it does not hold")

    @property
    def nbytes(self) -> int:
        """Size of the file in bytes."""
        return self._file.nbytes

    @property
    def header_bytes(self) -> int:
        """Bytes of the safetensors header: its length, and the table of streams."""
        return self._file.header_bytes

    @cached_property
    def document_bytes(self) -> int:
        """Bytes of manifest and graph as stored."""
        return self.stored_bytes(MANIFEST) + self.stored_bytes(GRAPH)

    def entry_bytes(self, name: str) -> int:
        """Returns the stored bytes of one tensor; for a packed one its share of the common stream."""
        entry = self.entries[name]
        if entry.codec == PACKED:
            return self._packed.stored_bytes(name, self.stored_bytes(packed_stream(entry.dtype)))
        # The manifest has a checksum for each stream, so its keys are the list of streams.
        return sum(self.stored_bytes(entry.stream(suffix)) for suffix in entry.crc32)

    def stored_bytes(self, stream: str) -> int:
        """Returns the bytes of one stream of the file."""
        return self._file.streams[stream].nbytes

    def tensor(self, name: str) -> SparseTensor:
        """Decodes one tensor, bit for bit as it was written.

        Raises:
            FormatError: a stream is damaged.
        """
        entry = self.entries[name]
        try:
            if entry.codec == PACKED:
                return self._packed.tensor(name, self._packed_stream)
            streams = {suffix: self._stream(entry.stream(suffix), crc32) for suffix, crc32 in entry.crc32.items()}
            return decoder_of(entry.codec)(streams, entry.spec.shape, entry.active, np.dtype(entry.dtype))
        except FormatError as error:
            raise self._damaged(f"tensor {name!r}: {error}") from error

    def dense(self) -> dict[str, Array]:
        """Decodes everything to dense arrays, which share one block of memory per dtype.

        One large block is faster to fill than many small ones, because the system backs it with large pages.

        Raises:
            FormatError: a stream is damaged.
        """
        sizes: dict[str, int] = {}
        starts = {}
        for name, entry in self.entries.items():
            starts[name] = sizes.get(entry.dtype, 0)
            sizes[entry.dtype] = starts[name] + -(-entry.spec.size // _ALIGNMENT) * _ALIGNMENT
        # np.zeros gets pages that the system zeroes when they are first written, so untouched ones cost nothing.
        memory = {dtype: np.zeros(size, dtype) for dtype, size in sizes.items()}
        return {
            name: self.tensor(name).to_dense(memory[entry.dtype][starts[name] : starts[name] + entry.spec.size])
            for name, entry in self.entries.items()
        }

    def __iter__(self) -> Iterator[tuple[str, SparseTensor]]:
        """Yields every tensor by name, decoded when its turn comes."""
        return ((name, self.tensor(name)) for name in self.entries)

    def check(self) -> None:
        """Decodes everything once and raises `FormatError` at the first damage."""
        for _ in self:
            pass

    def _manifest_digest(self) -> str:
        """Returns the manifest's SHA-256 in hexadecimal; raises unless this is an archive of our major version."""
        try:
            header = parse_json(self._file.metadata[METADATA].encode("utf-8"), METADATA)
            major = int(str(header["version"]).split(".", maxsplit=1)[0])
            digest = str(header["manifest_sha256"])
        except (ArithmeticError, KeyError, TypeError, ValueError) as error:
            raise FormatError(
                f"{str(self.path)!r} is a safetensors file but not a dsr archive; make one with `dsr-tool export`."
            ) from error
        if major != FORMAT_VERSION[0]:
            remedy = "install a newer dsr-tool" if major > FORMAT_VERSION[0] else "export it again"
            raise FormatError(
                f"{str(self.path)!r} has format version {header['version']}; this dsr-tool reads version "
                f"{FORMAT_VERSION[0]}.x, so {remedy}."
            )
        return digest

    def _manifest(self, digest: str) -> dict[str, Any]:
        try:
            stored = self._stream(MANIFEST, None)
            # Over the compressed bytes, so damage is found before they are decompressed.
            if hashlib.sha256(stored.tobytes()).hexdigest() != digest:
                raise FormatError("the checksum of its manifest does not match")
            return parse_json(decompress_document(stored), "its manifest")
        except FormatError as error:
            raise self._damaged(str(error)) from error

    def _check_streams(self, entries: list[Entry]) -> None:
        """Raises unless the file has exactly the streams of the listed tensors, and no name stands twice."""
        packed = self._packed.counts.keys()
        expected = [MANIFEST, GRAPH, *map(packed_stream, packed)]
        expected += [entry.stream(suffix) for entry in entries for suffix in entry.crc32]
        if (
            len(self.entries) != len(entries)
            or self._packed_crc32.keys() != packed
            or len(expected) != len(self._file.streams)
            or set(expected) != self._file.streams.keys()
        ):
            raise self._damaged("its tensors are not those that its manifest lists")

    def _read_graph(self, crc32: int) -> Graph:
        try:
            return Graph.from_json(decompress_document(self._stream(GRAPH, crc32)).decode("utf-8"))
        except (FormatError, UnicodeDecodeError) as error:
            raise self._damaged(str(error)) from error

    def _packed_stream(self, dtype: str) -> Array:
        return self._stream(packed_stream(dtype), self._packed_crc32[dtype])

    def _stream(self, name: str, crc32: int | None) -> Array:
        """Returns one stream; raises `FormatError` if its CRC-32 is another. None skips that check."""
        if name not in self._file.streams:
            raise FormatError(f"it has no stream {name!r}")
        try:
            array = self._file.get(name)
        except OSError as error:  # the disk may fail long after the file was opened
            raise FormatError(f"stream {name!r} cannot be read ({error.strerror or error})") from error
        if crc32 is not None and crc32_of(array) != crc32:
            raise FormatError(f"the checksum of stream {name!r} does not match")
        return array

    def _damaged(self, what: str) -> FormatError:
        # Codecs end their messages like this, and the sentence below says it again.
        what = what.removesuffix("; the file is damaged.").removesuffix(".")
        return FormatError(f"archive {str(self.path)!r} is damaged: {what}; export it again or fetch a whole copy.")
