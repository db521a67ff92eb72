"""Mutants of safetensors files, and of archives whose checksums are right, so that the content is what is checked."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from blind import any_bytes, choose, json_tree
from numpy.random import Generator

__all__ = ["archive", "repacked", "safetensors"]


def safetensors(random: Generator, corpus: Sequence[bytes]) -> bytes:
    """Makes a container with a changed header, or with a header that names a tensor twice."""
    data = choose(random, corpus)
    header, body = _container(data)
    if random.random() < 0.15:
        text = json.dumps(header, separators=(",", ":"))
        name = choose(random, list(header))
        text = text[:-1] + f",{json.dumps(name)}:{json.dumps(header[choose(random, list(header))])}}}"
    else:
        text = json.dumps(json_tree(random, header), separators=(",", ":"))
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw + body


def _container(data: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def archive(random: Generator, corpus: Sequence[bytes]) -> bytes:
    """Makes an archive with a wrong manifest, graph or stream behind correct checksums."""
    choice = random.random()
    if 0.4 <= choice < 0.6:
        return repacked(choose(random, corpus), lambda graph: json_tree(random, graph))
    header, metadata, streams, manifest = _archive(choose(random, corpus))
    if choice < 0.4:
        manifest = json_tree(random, manifest)
    else:
        _change_stream(random, header, streams, manifest)
    return _sealed(header, metadata, streams, manifest)


def repacked(data: bytes, change: Callable[[Any], Any]) -> bytes:
    """Replaces the graph of an archive."""
    header, metadata, streams, manifest = _archive(data)
    graph = change(json.loads(zlib.decompress(streams[":graph"])))
    _put(header, streams, ":graph", zlib.compress(json.dumps(graph).encode()))
    manifest["graph_crc32"] = zlib.crc32(streams[":graph"])
    return _sealed(header, metadata, streams, manifest)


def _archive(data: bytes) -> tuple[dict[str, Any], dict[str, str], dict[str, bytes], Any]:
    header, body = _container(data)
    metadata = header.pop("__metadata__")
    streams = {name: body[slice(*entry["data_offsets"])] for name, entry in header.items()}
    return header, metadata, streams, json.loads(zlib.decompress(streams[":manifest"]))


def _sealed(header: dict[str, Any], metadata: dict[str, str], streams: dict[str, bytes], manifest: Any) -> bytes:
    _put(header, streams, ":manifest", zlib.compress(json.dumps(manifest).encode()))
    inner = json.loads(metadata["dsr_archive"])
    inner["manifest_sha256"] = hashlib.sha256(streams[":manifest"]).hexdigest()
    return _packed({**header, "__metadata__": {"dsr_archive": json.dumps(inner)}}, streams)


def _change_stream(random: Generator, header: dict[str, Any], streams: dict[str, bytes], manifest: Any) -> None:
    """Changes the bytes of one coded stream, or the bytes that it inflates to, and corrects its checksum."""
    tensors = [tensor for tensor in manifest["tensors"] if tensor["crc32"]]
    if manifest.get("packed_crc32") and random.random() < 0.2:
        suffix = choose(random, list(manifest["packed_crc32"]))
        name, coded, checksums = f":packed:{suffix}", True, manifest["packed_crc32"]
    else:
        tensor = choose(random, tensors)
        suffix = choose(random, list(tensor["crc32"]))
        name = f"{tensor['name']}:{suffix}" if suffix else tensor["name"]
        coded, checksums = tensor["codec"] in ("delta", "palette", "grid", "grid-nm", "nm"), tensor["crc32"]
    data = streams[name]
    if coded and header[name]["dtype"] == "U8" and random.random() < 0.5:
        data = _deflated(_inflated_and_changed(random, data))
    elif header[name]["dtype"] == "U8":
        data = any_bytes(random, [data])
    else:
        changed = any_bytes(random, [data])
        data = (changed + data)[: len(data)]
    _put(header, streams, name, data)
    checksums[suffix] = zlib.crc32(data)


def _inflated_and_changed(random: Generator, data: bytes) -> bytes:
    try:
        raw = zlib.decompress(data, -15)
    except zlib.error:  # byte planes, which lie behind their lengths
        return any_bytes(random, [data])
    return raw + b"\xff" * int(random.integers(10**6)) if random.random() < 0.2 else any_bytes(random, [raw])


def _deflated(raw: bytes) -> bytes:
    coder = zlib.compressobj(1, zlib.DEFLATED, -15)
    return coder.compress(raw) + coder.flush()


def _put(header: dict[str, Any], streams: dict[str, bytes], name: str, data: bytes) -> None:
    streams[name] = data
    if header[name]["dtype"] == "U8":
        header[name]["shape"] = [len(data)]


def _packed(header: dict[str, Any], streams: dict[str, bytes]) -> bytes:
    body, end = b"", 0
    for name, data in streams.items():
        header[name]["data_offsets"] = [end, end + len(data)]
        body, end = body + data, end + len(data)
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + body
