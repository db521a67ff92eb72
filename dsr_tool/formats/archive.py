"""The archive: one file with the graph, every weight, the manifest and checksums.

The container is safetensors; `docs/format.md` describes the content so that a stranger can read it.
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
from dsr_tool.formats.archive_writer import ENCODINGS, Encoded, encode_archive, write_archive
from dsr_tool.formats.codecs import CODECS
from dsr_tool.formats.manifest import (
    FORMAT_VERSION,
    GRAPH,
    MANIFEST,
    METADATA,
    PACKED,
    Entry,
    check_claim,
    crc32_of,
    packed_stream,
    unpack,
)
from dsr_tool.formats.packed import Packed
from dsr_tool.formats.tensor_file import Container, parse_json, whole
from dsr_tool.graph.ir import Graph
from dsr_tool.sparsity.config import ModelConfig
from dsr_tool.sparsity.tensor import Array, SparseTensor

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

_ALIGNED = 64


def open_archive(path: str | Path, *, max_decoded_bytes: int | None = None) -> Archive:
    """Open an archive and check its header, manifest and graph; weights are decoded when asked for.

    Args:
        path: a `.dsr` file.
        max_decoded_bytes: refuse files that claim to hold more than this, decoded. When absent, 10,000 times the size
            of the file and 256 MiB, and no more than 16 GiB.

    Raises:
        FileError: there is no such file, or it cannot be read.
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

    def __init__(self, path: Path, max_decoded_bytes: int | None = None) -> None:
        """Use `open_archive`."""
        self.path = path
        try:
            self._container = Container(path)
        except OSError as error:
            raise FileError(f"archive {str(path)!r} cannot be read: {error.strerror or error}.") from error
        except FormatError as error:
            raise FormatError(f"{str(path)!r} is not a dsr archive, or is cut off or damaged ({error}).") from error
        manifest = self._manifest()
        try:
            self.config = ModelConfig.from_dict(manifest["model"])
            entries = [Entry.from_dict(data) for data in manifest["tensors"]]
            self.versions = {str(name): str(text) for name, text in manifest["versions"].items()}
            graph_crc32 = manifest["graph_crc32"]
            self._packed_crc32: dict[str, int] = dict(manifest["packed_crc32"])
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise self._damaged(f"its manifest is not understood ({error})") from error
        if not all(map(whole, (graph_crc32, *self._packed_crc32.values()))):
            raise self._damaged("its manifest is not understood (a checksum is no number)")
        self.entries = {entry.spec.name: entry for entry in entries}
        self._packed = Packed(self.entries)
        self._check_entries(entries, max_decoded_bytes)
        self.graph = self._graph(graph_crc32)
        if absent := [name for name in self.graph.parameters if name not in self.entries]:
            raise self._damaged(f"its graph uses {absent[0]!r}, which it does not hold")

    @property
    def nbytes(self) -> int:
        """Size of the file in bytes."""
        return self._container.nbytes

    @property
    def header_bytes(self) -> int:
        """Bytes of the container's own header: its length, and the table of streams."""
        return self._container.header_bytes

    @cached_property
    def document_bytes(self) -> int:
        """Bytes of manifest and graph as stored."""
        return self.stored_bytes(MANIFEST) + self.stored_bytes(GRAPH)

    def entry_bytes(self, name: str) -> int:
        """Bytes of all streams of one tensor as stored; of a packed one its share of their stream, by its entries."""
        entry = self.entries[name]
        if entry.codec == PACKED:
            return self._packed.share(name, self.stored_bytes(packed_stream(entry.dtype)))
        return sum(self.stored_bytes(entry.stream(suffix)) for suffix in entry.crc32)

    def stored_bytes(self, stream: str) -> int:
        """Bytes of one stream of the container."""
        return self._container.streams[stream].nbytes

    def tensor(self, name: str) -> SparseTensor:
        """Decode one tensor, bit for bit what was written.

        Raises:
            FormatError: a stream is damaged.
        """
        entry = self.entries[name]
        try:
            if entry.codec == PACKED:
                return self._packed.tensor(name, self._packed_stream)
            streams = {suffix: self._stream(entry.stream(suffix), crc) for suffix, crc in entry.crc32.items()}
            return CODECS[entry.codec].decode(streams, entry.spec.shape, entry.active, np.dtype(entry.dtype))
        except FormatError as error:
            raise self._damaged(f"tensor {name!r}: {error}") from error

    def dense(self) -> dict[str, Array]:
        """Decode everything to dense arrays, which share one piece of memory per type.

        One large piece is quicker to fill than many, since the system hands it out in large pages.

        Raises:
            FormatError: a stream is damaged.
        """
        sizes: dict[str, int] = {}
        starts = {}
        for name, entry in self.entries.items():
            starts[name] = sizes.get(entry.dtype, 0)
            sizes[entry.dtype] = starts[name] + -(-entry.spec.size // _ALIGNED) * _ALIGNED
        memory = {dtype: np.zeros(size, dtype) for dtype, size in sizes.items()}
        return {
            name: self.tensor(name).to_dense(memory[entry.dtype][starts[name] : starts[name] + entry.spec.size])
            for name, entry in self.entries.items()
        }

    def __iter__(self) -> Iterator[tuple[str, SparseTensor]]:
        """Every tensor in turn, decoded."""
        return ((name, self.tensor(name)) for name in self.entries)

    def check(self) -> None:
        """Decode everything once; raise `FormatError` at the first damage."""
        for _ in self:
            pass

    def _manifest(self) -> dict[str, Any]:
        try:
            header = parse_json(self._container.metadata[METADATA].encode("utf-8"), METADATA)
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
        try:
            packed = self._stream(MANIFEST, None)
            if hashlib.sha256(packed.tobytes()).hexdigest() != digest:
                raise FormatError("the checksum of its manifest does not match")
            return parse_json(unpack(packed), "its manifest")
        except FormatError as error:
            raise self._damaged(str(error)) from error

    def _check_entries(self, entries: list[Entry], max_decoded_bytes: int | None) -> None:
        packed = self._packed.counts.keys()
        expected = [MANIFEST, GRAPH, *map(packed_stream, packed)]
        expected += [entry.stream(suffix) for entry in entries for suffix in entry.crc32]
        if (
            len(self.entries) != len(entries)
            or self._packed_crc32.keys() != packed
            or len(expected) != len(self._container.streams)
            or set(expected) != self._container.streams.keys()
        ):
            raise self._damaged("its tensors are not those that its manifest lists")
        check_claim(self.path, entries, self.nbytes, max_decoded_bytes)

    def _graph(self, crc32: int) -> Graph:
        try:
            return Graph.from_json(unpack(self._stream(GRAPH, crc32)).decode("utf-8"))
        except (FormatError, UnicodeDecodeError) as error:
            raise self._damaged(str(error)) from error

    def _packed_stream(self, dtype: str) -> Array:
        return self._stream(packed_stream(dtype), self._packed_crc32[dtype])

    def _stream(self, name: str, crc32: int | None) -> Array:
        """One stream, its checksum compared."""
        if name not in self._container.streams:
            raise FormatError(f"it has no stream {name!r}")
        try:
            array = self._container.get(name)
        except OSError as error:
            raise FormatError(f"stream {name!r} cannot be read ({error.strerror or error})") from error
        if crc32 is not None and crc32_of(array) != crc32:
            raise FormatError(f"the checksum of stream {name!r} does not match")
        return array

    def _damaged(self, what: str) -> FormatError:
        what = what.removesuffix("; the file is damaged.").removesuffix(".")
        return FormatError(f"archive {str(self.path)!r} is damaged: {what}; export it again or fetch a whole copy.")
