"""Mutants of valid files: blind changes of bytes, and changes of content behind correct checksums.

The first kind tests parsers. The second gets past them and tests the checks of content.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from numpy.random import Generator

NUMBERS = (
    0,
    1,
    -1,
    2,
    7,
    255,
    256,
    65535,
    2**31 - 1,
    2**31,
    2**32,
    2**40,
    2**63 - 1,
    2**63,
    2**64,
    10**400,
    0.5,
    1e308,
)
TEXTS = (
    "",
    "x",
    "../../etc/passwd",
    "/dev/zero",
    "os:system",
    "\0",
    "é" * 300,
    "float32",
    "object",
    "|O",
    "NaN",
    "__class__",
)
BOMB_BYTES = 256 << 20
"""Size of a member that inflates without end; a quarter of the memory that a reader may take."""

Mutate = Callable[[Generator, Sequence[bytes]], bytes]
"""Makes a mutant from the valid files of one kind."""


# --- any file: bytes without meaning ---------------------------------------------------------------------


def any_bytes(random: Generator, corpus: Sequence[bytes]) -> bytes:
    """Makes one to four blind changes of one of the files."""
    data = bytearray(_choice(random, corpus))
    for _ in range(int(random.integers(1, 5))):
        data = _choice(random, _BLIND)(random, data, corpus)
    return bytes(data)


def _span(random: Generator, data: bytearray, longest: int = 64) -> tuple[int, int]:
    start = int(random.integers(0, len(data) + 1))
    return start, min(len(data), start + int(random.integers(1, longest)))


def _flip(random: Generator, data: bytearray, _: Sequence[bytes]) -> bytearray:
    if data:
        data[int(random.integers(len(data)))] ^= 1 << int(random.integers(8))
    return data


def _cut(random: Generator, data: bytearray, _: Sequence[bytes]) -> bytearray:
    return data[: int(random.integers(0, len(data) + 1))]


def _remove(random: Generator, data: bytearray, _: Sequence[bytes]) -> bytearray:
    start, end = _span(random, data)
    return data[:start] + data[end:]


def _insert(random: Generator, data: bytearray, _: Sequence[bytes]) -> bytearray:
    start, _end = _span(random, data)
    return data[:start] + random.bytes(int(random.integers(1, 32))) + data[start:]


def _repeat(random: Generator, data: bytearray, _: Sequence[bytes]) -> bytearray:
    start, end = _span(random, data, 512)
    return data[:end] + data[start:end] + data[end:]


def _number(random: Generator, data: bytearray, _: Sequence[bytes]) -> bytearray:
    width = int(random.choice([1, 2, 4, 8]))
    value = int(random.choice([0, 1, 255, 2**31 - 1, 2**31, 2**63, 2**64 - 1], shuffle=False).astype(object))
    start, _end = _span(random, data)
    return data[:start] + (value % (1 << 8 * width)).to_bytes(width, "little") + data[start + width :]


def _splice(random: Generator, data: bytearray, corpus: Sequence[bytes]) -> bytearray:
    other = _choice(random, corpus)
    return data[: int(random.integers(0, len(data) + 1))] + other[int(random.integers(0, len(other) + 1)) :]


_BLIND = (_flip, _flip, _cut, _remove, _insert, _repeat, _number, _splice)


# --- JSON: values of the wrong kind, absent keys, repeated ones ------------------------------------------


def json_tree(random: Generator, document: Any) -> Any:
    """Makes one to three changes anywhere in a document."""
    for _ in range(int(random.integers(1, 4))):
        document = _changed(random, document)
    return document


def _changed(random: Generator, value: Any) -> Any:
    if isinstance(value, dict) and value and random.random() < 0.9:
        key = _choice(random, list(value))
        if random.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if random.random() < 0.1:
            return {**value, _choice(random, [*TEXTS, *value]): value[key]}
        return {**value, key: _changed(random, value[key])}
    if isinstance(value, list) and value and random.random() < 0.9:
        i = int(random.integers(len(value)))
        choice = random.random()
        if choice < 0.1:
            return value[:i] + value[i + 1 :]
        if choice < 0.2:
            return [*value[:i], value[i], *value[i:]]
        return [*value[:i], _changed(random, value[i]), *value[i + 1 :]]
    if isinstance(value, int) and random.random() < 0.4:
        return value + int(random.integers(-2, 3))
    return _choice(random, (*NUMBERS, *TEXTS, None, True, [], {}, [[]], {"a": {}}, float("inf"), float("nan")))


def json_bytes(random: Generator, corpus: Sequence[bytes]) -> bytes:
    """Makes a JSON file with wrong values, or with brackets without end."""
    if random.random() < 0.02:
        return b"[" * int(random.integers(10**5))
    document = json.loads(_choice(random, corpus))
    return json.dumps(json_tree(random, document), ensure_ascii=False).encode("utf-8", "surrogatepass")


# --- safetensors: header and data changed apart ----------------------------------------------------------


def safetensors(random: Generator, corpus: Sequence[bytes]) -> bytes:
    """Makes a container with a changed header, or with a header that names a tensor twice."""
    data = _choice(random, corpus)
    header, body = _container(data)
    if random.random() < 0.15:
        text = json.dumps(header, separators=(",", ":"))
        name = _choice(random, list(header))
        text = text[:-1] + f",{json.dumps(name)}:{json.dumps(header[_choice(random, list(header))])}}}"
    else:
        text = json.dumps(json_tree(random, header), separators=(",", ":"))
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw + body


def _container(data: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


# --- archives: mutants with right checksums --------------------------------------------------------------


def archive(random: Generator, corpus: Sequence[bytes]) -> bytes:
    """Makes an archive with a wrong manifest, graph or stream behind correct checksums."""
    choice = random.random()
    if 0.4 <= choice < 0.6:
        return repacked(_choice(random, corpus), lambda graph: json_tree(random, graph))
    header, metadata, streams, manifest = _archive(_choice(random, corpus))
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
        suffix = _choice(random, list(manifest["packed_crc32"]))
        name, coded, checksums = f":packed:{suffix}", True, manifest["packed_crc32"]
    else:
        tensor = _choice(random, tensors)
        suffix = _choice(random, list(tensor["crc32"]))
        name = f"{tensor['name']}:{suffix}" if suffix else tensor["name"]
        coded, checksums = tensor["codec"] == "delta", tensor["crc32"]
    data = streams[name]
    if coded and random.random() < 0.5:
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


# --- zip files of numpy arrays ---------------------------------------------------------------------------


def npz(random: Generator, corpus: Sequence[bytes]) -> bytes:
    """Makes a zip whose members are changed, renamed, duplicated, absent or without end, with correct checksums."""
    with zipfile.ZipFile(io.BytesIO(_choice(random, corpus))) as source:
        members = [(name, source.read(name)) for name in source.namelist()]
    i = int(random.integers(len(members)))
    name, data = members[i]
    choice = random.random()
    if choice < 0.55:
        members[i] = name, _changed_array(random, data)
    elif choice < 0.65:
        members[i] = _choice(random, (*TEXTS, "a/b.npy", "C:\\x.npy", members[0][0])) or "x", data
    elif choice < 0.75:
        members.append((name, _choice(random, members)[1]))
    elif choice < 0.85:
        del members[i]
    elif choice < 0.98:
        other = int(random.integers(len(members)))
        members[i], members[other] = (name, members[other][1]), (members[other][0], data)
    else:
        members[i] = name, data + bytes(BOMB_BYTES)
    return _zipped(members)


def _changed_array(random: Generator, data: bytes) -> bytes:
    """Changes the values of an array in their own type, its header, or any byte."""
    choice = random.random()
    if choice < 0.3:
        return any_bytes(random, [data])
    end = data.index(b"\n") + 1 if b"\n" in data[:1000] else len(data)
    head, body = data[:end], bytearray(data[end:])
    if choice < 0.6:
        old, new = _choice(random, _HEADER_CHANGES)
        return head.replace(old, new) + body
    for _ in range(int(random.integers(1, 4))):
        if len(body) >= 4:
            at = 4 * int(random.integers(len(body) // 4))
            body[at : at + 4] = struct.pack("<i", int(random.integers(-3, 2**31)) >> int(random.integers(32)))
    return head + bytes(body)


_HEADER_CHANGES = (
    (b"(", b"(9,"),
    (b",), }", b"00000000,), }"),
    (b"<i4", b"<i8"),
    (b"<i4", b"|O "),
    (b"<f4", b"|O8"),
    (b"<f4", b"<c8"),
    (b"False", b"True "),
    (b"<f4", b"<M8"),
    (b"'shape': (", b"'shape': (-1, "),
    (b"'shape'", b"'shope'"),
    (b"{", b"[" * 30 + b"{"),
)


def _zipped(members: Sequence[tuple[str, bytes]]) -> bytes:
    import warnings

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as target, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns about duplicate names, which are meant here
        for name, data in members:
            target.writestr(zipfile.ZipInfo(name), data, compress_type=zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


# --- ONNX: well-formed protobuf that lies ----------------------------------------------------------------


def onnx_model(random: Generator, corpus: Sequence[bytes]) -> bytes:
    """Makes an ONNX file with wrong dimensions, types, names, links or data."""
    import onnx

    model = onnx.ModelProto.FromString(_choice(random, corpus))
    for _ in range(int(random.integers(1, 4))):
        _choice(random, _ONNX_CHANGES)(random, model.graph)
    if random.random() < 0.1 and model.metadata_props:
        entry = model.metadata_props[0]
        entry.value = json.dumps(json_tree(random, json.loads(entry.value)))
    return bytes(model.SerializeToString())


def _tensor(random: Generator, graph: Any) -> Any:
    sparse = [part for tensor in graph.sparse_initializer for part in (tensor.values, tensor.indices)]
    return _choice(random, [*graph.initializer, *sparse])


def _dims(random: Generator, graph: Any) -> None:
    dims = _tensor(random, graph).dims
    values = [0, 1, -1, 3, 255, 2**31, 2**40, 2**62]
    if dims and random.random() < 0.7:
        dims[int(random.integers(len(dims)))] = _choice(random, values)
    else:
        dims.append(_choice(random, values))


def _raw(random: Generator, graph: Any) -> None:
    tensor = _tensor(random, graph)
    changed = any_bytes(random, [tensor.raw_data])
    tensor.raw_data = (changed + tensor.raw_data)[: len(tensor.raw_data)] if random.random() < 0.7 else changed


def _kind(random: Generator, graph: Any) -> None:
    _tensor(random, graph).data_type = int(random.integers(0, 25))


def _name(random: Generator, graph: Any) -> None:
    _tensor(random, graph).name = _choice(random, (*TEXTS[:3], _tensor(random, graph).name))


def _external(random: Generator, graph: Any) -> None:
    tensor = _tensor(random, graph)
    tensor.data_location = 1
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", _choice(random, TEXTS[1:4])


def _link(random: Generator, graph: Any) -> None:
    node, other = _choice(random, graph.node), _choice(random, graph.node)
    names = _choice(random, (node.input, node.output))
    if names:
        names[int(random.integers(len(names)))] = _choice(random, (*other.input, *other.output, "x", ""))


def _operator(random: Generator, graph: Any) -> None:
    node = _choice(random, graph.node)
    node.op_type = _choice(random, [other.op_type for other in graph.node] + ["Constant", "Loop", "NoSuchOperator"])


def _attribute(random: Generator, graph: Any) -> None:
    node = _choice(random, graph.node)
    if node.attribute:
        attribute = _choice(random, node.attribute)
        attribute.i = int(_choice(random, [0, 1, -1, 7, 13, 2**40]))
        if attribute.ints:
            attribute.ints[0] = int(_choice(random, [0, -1, 2**31, 2**62]))


def _order(random: Generator, graph: Any) -> None:
    field = _choice(random, (graph.node, graph.initializer))
    items = list(field)
    i = int(random.integers(len(items)))
    choice = random.random()
    items = items[:i] + items[i + 1 :] if choice < 0.4 else [*items, items[i]] if choice < 0.7 else items[::-1]
    del field[:]
    field.extend(items)


_ONNX_CHANGES = (_dims, _dims, _raw, _raw, _kind, _name, _external, _link, _operator, _attribute, _order)


def _choice(random: Generator, choices: Sequence[Any]) -> Any:
    return choices[int(random.integers(len(choices)))]


MUTATORS: dict[str, tuple[Mutate, ...]] = {
    "archive": (any_bytes, safetensors, archive, archive, archive),
    "predict": (archive,),
    "onnx": (any_bytes, onnx_model, onnx_model),
    "npz": (any_bytes, npz, npz),
    "weights": (any_bytes, safetensors),
    "masks": (any_bytes, safetensors),
    "config": (any_bytes, json_bytes, json_bytes),
    "safetensors": (any_bytes, safetensors),
    "pickle": (any_bytes,),
}
"""Mutators by kind of file; a mutator that stands there several times is drawn as often."""
