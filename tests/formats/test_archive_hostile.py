"""Damaged and hostile archives: each is refused with a FormatError, without much memory or time."""

import hashlib
import json
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from dsr_tool.errors import FormatError
from dsr_tool.formats.archive import open_archive
from dsr_tool.formats.tensor_file import TensorFile


def test_every_flipped_byte_is_detected(archive, tmp_path):
    reference = {name: tensor.values.tobytes() for name, tensor in open_archive(archive)}
    raw, damaged = archive.read_bytes(), tmp_path / "damaged.dsr"
    for at in range(0, len(raw), 3):
        damaged.write_bytes(raw[:at] + bytes([raw[at] ^ 0x41]) + raw[at + 1 :])
        with pytest.raises(FormatError, match="damaged"):
            dict(open_archive(damaged))
    assert {name: tensor.values.tobytes() for name, tensor in open_archive(archive)} == reference


def test_every_truncation_is_detected(archive, tmp_path):
    raw, cut = archive.read_bytes(), tmp_path / "cut.dsr"
    for length in range(0, len(raw), 7):
        cut.write_bytes(raw[:length])
        with pytest.raises(FormatError):
            open_archive(cut).check()


def test_a_claim_of_terabytes_is_refused_before_anything_is_allocated(archive, rewrite):
    rewrite(archive, lambda manifest: manifest["tensors"][0].update(shape=[1 << 20, 1 << 19], active=0))
    with pytest.raises(FormatError, match="claims 2,7"):
        open_archive(archive)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["tensors"][0].update(active=10**6),
        lambda m: m["tensors"][0].update(active=-1),
        lambda m: m["tensors"][0].update(codec="pickle"),
        lambda m: m["tensors"][0].update(dtype="object"),
        lambda m: m["tensors"][0].update(shape=[-8, -40]),
        lambda m: m["tensors"][0].update(shape=[1 << 70, 0]),
        lambda m: m["tensors"][1].update(shape=[1 << 39, 1 << 39, 0], active=0),
        lambda m: m["tensors"][0].update(shape=[float("inf")]),
        lambda m: m["tensors"][0].update(shape=[1] * 33),
        lambda m: m["tensors"][0].update(shape=[1 << 39] * 100_000),
        lambda m: m["tensors"][0].update(active=True),
        lambda m: m["tensors"][0].update(active=63),
        lambda m: m["tensors"][0].update(codec="csr"),
        lambda m: m["tensors"][0].update(dtype="float16"),
        lambda m: m["tensors"][0].update(codec="packed"),
        lambda m: m["tensors"][1].update(codec="dense"),
        lambda m: m["tensors"][1].update(active=7),
        lambda m: m["tensors"][1].update(shape=[4, 2, 2]),
        lambda m: m["tensors"][1].update(dtype="int64"),
        lambda m: m["tensors"][1].update(crc32={"": 0}),
        lambda m: m["tensors"][1].update(crc32=[]),
        lambda m: m["packed_crc32"].update(float32=1.5),
        lambda m: m["packed_crc32"].update(float64=0),
        lambda m: m["packed_crc32"].pop("int64"),
        lambda m: m.pop("packed_crc32"),
        lambda m: m.update(packed_crc32=None),
        lambda m: m.update(graph_crc32="0"),
        lambda m: m["tensors"][0].update(macs_per_weight=float("nan")),
        lambda m: m["tensors"][0].update(macs_per_weight=-5),
        lambda m: m["tensors"][0].update(role="buffer", dtype="int64"),
        lambda m: m["model"].update(num_classes=float("inf")),
        lambda m: m["model"].update(num_classes=10**30),
        lambda m: m["tensors"][0].update(name="fc.other"),
        lambda m: m["tensors"][0].pop("crc32"),
        lambda m: m["tensors"].append(m["tensors"][0]),
        lambda m: m["tensors"].append({**m["tensors"][1], "name": ":graph", "codec": "dense", "crc32": {"": 0}}),
        lambda m: m["tensors"].append(
            {**m["tensors"][1], "name": "fc.weight:mask", "codec": "dense", "crc32": {"": 0}}
        ),
        lambda m: m["tensors"].pop(),
        lambda m: m.update(tensors={}),
        lambda m: m.update(model=[]),
        lambda m: m["model"].update(architecture=["os.system"]),
        lambda m: m.pop("versions"),
    ],
)
def test_manifests_that_disagree_with_the_file_are_refused(archive, change, rewrite):
    rewrite(archive, change)
    with pytest.raises(FormatError):
        open_archive(archive).check()


def parse(path):
    """Returns header and data of a safetensors file."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:start]), raw[start:]


def build(path, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def twice(header):
    text = json.dumps(header)
    return (text[:-1] + "," + text[1:]).encode()


@pytest.mark.parametrize(
    "change",
    [
        twice,
        lambda h: h[":graph"].update(data_offsets=h[":manifest"]["data_offsets"]),
        lambda h: h[":graph"].update(data_offsets=h[":graph"]["data_offsets"][::-1]),
        lambda h: h[":graph"].update(data_offsets=[n + 1 for n in h[":graph"]["data_offsets"]]),
        lambda h: h[":graph"].update(data_offsets=[float(n) for n in h[":graph"]["data_offsets"]]),
        lambda h: h[":graph"].update(data_offsets=[True, False]),
        lambda h: h[":graph"].update(data_offsets=[-1, 1]),
        lambda h: h[":graph"].update(shape=[1 << 62, 1 << 62]),
        lambda h: h[":graph"].update(shape=[0, 1 << 62]),
        lambda h: h[":graph"].update(shape=[1] * 10_000),
        lambda h: h[":graph"].update(shape="8"),
        lambda h: h[":graph"].update(dtype="F8_E4M3"),
        lambda h: h[":graph"].update(dtype=["U8"]),
        lambda h: h[":graph"].update(more=1),
        lambda h: h.update({":graph": None}),
        lambda h: h.update({":more": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}),
        lambda h: h.pop(":graph"),
        lambda h: h.update(__metadata__={"dsr_archive": 1}),
        lambda h: h.update(__metadata__=[]),
        lambda h: h["__metadata__"].update(dsr_archive="[" * 100_000),
        lambda h: h["__metadata__"].update(dsr_archive="\ud800"),
        lambda h: b"[]",
        lambda h: b"{" * 100_000,
        lambda h: b'{"a": ' + b"9" * 5000 + b"}",
        lambda h: b"\xff" * 20,
    ],
)
def test_malformed_headers_are_refused(archive, change):
    header, data = parse(archive)
    changed = change(header)
    build(archive, changed if isinstance(changed, bytes) else header, data)
    with pytest.raises(FormatError):
        open_archive(archive).check()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 700), byte=st.integers(0, 255))
def test_safetensors_reads_the_same_from_every_file_that_is_accepted(tmp_path, at, byte):
    path = tmp_path / "a"
    arrays = {"a": np.arange(6, dtype=np.float16).reshape(2, 3), "b": np.zeros((0, 4)), "c": np.array(True)}
    save_file(arrays, path, metadata={"x": "y"})
    raw = bytearray(path.read_bytes())
    raw[at % len(raw)] = byte
    path.write_bytes(raw)
    try:
        file = TensorFile(path)
        found = {name: file.get(name) for name in file.streams}
    except FormatError:
        return
    expected = load_file(path)
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert (array.shape, array.dtype, array.tobytes()) == (
            expected[name].shape,
            expected[name].dtype,
            expected[name].tobytes(),
        )


@pytest.mark.parametrize("stream", [":manifest", ":graph"])
@pytest.mark.parametrize("text", [b" " * (80 << 20), b"[" * (3 << 20), b"\xff", b"[]", b"{}"])
def test_documents_that_are_too_long_or_malformed_are_refused(archive, stream, text, rewrite):
    packed = np.frombuffer(zlib.compress(text, 9), np.uint8)
    if stream == ":graph":
        rewrite(archive, lambda manifest: manifest.update(graph_crc32=zlib.crc32(packed)), streams={stream: packed})
    else:
        header = {"version": "1.0", "manifest_sha256": hashlib.sha256(packed).hexdigest()}
        save_file({**load_file(archive), stream: packed}, archive, metadata={"dsr_archive": json.dumps(header)})
    with pytest.raises(FormatError):
        open_archive(archive)


@pytest.mark.parametrize("dtype", ["int64", "float32"])
def test_packed_planes_that_disagree_with_the_manifest_are_refused(archive, rewrite, dtype):
    short = load_file(archive)[f":packed:{dtype}"][:-1].copy()
    crc32 = {dtype: zlib.crc32(short)}
    rewrite(archive, lambda manifest: manifest["packed_crc32"].update(crc32), streams={f":packed:{dtype}": short})
    with pytest.raises(FormatError, match="damaged"):
        open_archive(archive).check()


def test_rows_of_a_grid_without_entries_are_counted(archive, rewrite):
    rows = {"shape": [1 << 33, 0], "active": 0, "role": "dense", "codec": "grid"}
    rewrite(archive, lambda manifest: manifest["tensors"][0].update(rows))
    with pytest.raises(FormatError, match="claims 103,"):
        open_archive(archive)


def test_a_small_file_cannot_claim_gigabytes(archive, rewrite):
    rewrite(archive, lambda manifest: manifest["tensors"][0].update(shape=[1 << 14, 1 << 13]))
    with pytest.raises(FormatError, match="raise max_decoded_bytes if you trust"):
        open_archive(archive)
    open_archive(archive, max_decoded_bytes=1 << 32)
