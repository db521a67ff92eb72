"""A reader written from docs/format.md alone, with numpy, zlib and json, reads frozen files and fresh ones."""

import hashlib
import importlib.util
import json
import math
import zlib
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

GOLDEN = Path(__file__).parent / "golden"
WRITTEN = ["delta", "bitmask", "csr", "dense", "palette", "grid", "auto-1.1", "fp16-1.1", "nm", "grid-nm"]
FILES = [*WRITTEN, "auto", "fp16"]

# --- the reader: begin ---

TYPES = {"BOOL": "?", "U8": "u1", "I32": "<i4", "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8"}


def container(path):
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    texts, streams = header.pop("__metadata__"), {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        data = np.frombuffer(raw[start + first : start + last], TYPES[entry["dtype"]])
        streams[name] = data.reshape(entry["shape"])
    return texts, streams


def runs(coded):
    found, p = [], -1
    for byte in zlib.decompress(coded.tobytes(), wbits=-15):
        p += 255 if byte == 255 else byte + 1
        if byte != 255:
            found.append(p)
    return np.array(found, int)


def groups(stream, shape):
    n, m = (int(byte) for byte in stream[:2])
    choices = sorted(combinations(range(m), n), key=lambda places: places[::-1])
    digits = max(k for k in range(65) if len(choices) ** k <= 1 << 64)
    words, numbers = np.frombuffer(stream[2:].tobytes(), "<u8"), []
    for word in map(int, words):
        numbers += [word // len(choices) ** k % len(choices) for k in range(digits)]
    taps, where = math.prod(shape[2:]), []
    for number, (o, y, g) in zip(numbers, np.ndindex(shape[0], taps, shape[1] // m), strict=False):
        where += [(o * shape[1] + g * m + place) * taps + y for place in choices[number]]
    return np.sort(where)


def planes(stream, count, dtype):
    raw, width, at, found = stream.tobytes(), np.dtype(dtype).itemsize, 0, []
    for _ in range(width):
        length = int.from_bytes(raw[at : at + 8], "little")
        plane = raw[at + 8 : at + 8 + length]
        found.append(np.frombuffer(plane if length == count else zlib.decompress(plane, wbits=-15), np.uint8))
        at += 8 + length
    rotated = np.stack(found, 1).copy().view(f"<u{width}")[:, 0]
    return ((rotated >> 1) | (rotated << (8 * width - 1))).view(dtype)


def decode(entry, stream):
    size, active, dtype = math.prod(entry["shape"]), entry["active"], entry["dtype"]
    if entry["codec"] == "dense":
        return stream("")
    if entry["codec"] == "bitmask":
        where, values = np.flatnonzero(np.unpackbits(stream("mask"))[:size]), stream("values")
    elif entry["codec"] == "csr":
        rows = np.repeat(np.arange(entry["shape"][0]), np.diff(stream("indptr")))
        where, values = rows * (size // entry["shape"][0]) + stream("indices"), stream("values")
    elif entry["codec"] == "palette":
        where, table = runs(stream("mask")), stream("table")
        width = 1 if len(table) <= 1 << 8 else 2 if len(table) <= 1 << 16 else 4
        values = table[planes(stream("indices"), active, f"<u{width}")]
    elif entry["codec"] in ("grid", "grid-nm"):
        rows = entry["shape"][0] if len(entry["shape"]) > 1 else 1
        where = runs(stream("mask")) if entry["codec"] == "grid" else groups(stream("mask"), entry["shape"])
        codes, scales = planes(stream("codes"), active, "i1"), planes(stream("scales"), rows, "<f4")
    elif entry["codec"] == "nm":
        where, values = groups(stream("mask"), entry["shape"]), planes(stream("values"), active, dtype)
    else:
        assert entry["codec"] == "delta", f"this reader has no decoder of {entry['codec']}; add it from docs/format.md"
        where, values = runs(stream("mask")), planes(stream("values"), active, dtype)
    if entry["codec"] in ("delta", "palette", "grid") and 2 * active > size:
        where = np.setdiff1d(np.arange(size), where)
    if entry["codec"].startswith("grid"):
        values = codes.astype("<f4") * scales[where // (size // rows)]
    dense = np.zeros(size, dtype)
    dense[where] = values
    return dense


def read(path):
    texts, streams = container(path)
    header, packed = json.loads(texts["dsr_archive"]), streams[":manifest"].tobytes()
    assert header["version"].split(".")[0] == "1"
    assert hashlib.sha256(packed).hexdigest() == header["manifest_sha256"]
    manifest = json.loads(zlib.decompress(packed))
    assert zlib.crc32(streams[":graph"]) == manifest["graph_crc32"]
    tensors, shared = {}, {}
    for dtype, crc32 in manifest["packed_crc32"].items():
        assert zlib.crc32(streams[f":packed:{dtype}"]) == crc32
        total = sum(math.prod(e["shape"]) for e in manifest["tensors"] if (e["codec"], e["dtype"]) == ("packed", dtype))
        shared[dtype] = planes(streams[f":packed:{dtype}"], total, dtype)
    for entry in manifest["tensors"]:

        def stream(suffix, entry=entry):
            array = streams[f"{entry['name']}:{suffix}" if suffix else entry["name"]]
            assert zlib.crc32(array) == entry["crc32"][suffix]
            return array

        if entry["codec"] == "packed":
            array, shared[entry["dtype"]] = np.split(shared[entry["dtype"]], [math.prod(entry["shape"])])
        else:
            array = decode(entry, stream)
        tensors[entry["name"]] = array.reshape(entry["shape"])
    return tensors, json.loads(zlib.decompress(streams[":graph"]))


# --- the reader: end ---


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("golden_make", GOLDEN / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reader_is_short():
    text = Path(__file__).read_text(encoding="utf-8")
    reader = text.partition("# --- the reader: begin ---")[2].partition("# --- the reader: end ---")[0]
    assert sum(bool(line.strip()) for line in reader.splitlines()) < 95


@pytest.mark.parametrize("file", FILES)
def test_the_document_is_enough_to_read_an_archive(recipe, file):
    tensors, graph = read(GOLDEN / f"{file}.dsr")
    assert list(tensors) == list(recipe.SHAPES)
    for name, shape in recipe.SHAPES.items():
        values = recipe.values(name, file)
        expected = np.zeros(math.prod(shape), values.dtype)
        expected[recipe.active(name, file)] = values
        assert (tensors[name].shape, tensors[name].dtype) == (shape, values.dtype)
        assert tensors[name].tobytes() == expected.tobytes()
    assert graph["nodes"][0]["op"] == "Gemm"


@pytest.mark.parametrize("file", FILES)
def test_frozen_archives_stay_readable(recipe, file):
    from dsr_tool import open_archive

    archive = open_archive(GOLDEN / f"{file}.dsr")
    for name, tensor in archive:
        np.testing.assert_array_equal(tensor.mask.positions, recipe.active(name, file))
        assert tensor.values.tobytes() == recipe.values(name, file).tobytes()
    np.testing.assert_array_equal(archive.graph.constants["k"], [1, -2])


def test_the_writer_writes_the_frozen_bytes(recipe, tmp_path):
    recipe.main(tmp_path)
    for file in WRITTEN:
        (_, frozen), (_, fresh) = container(GOLDEN / f"{file}.dsr"), container(tmp_path / f"{file}.dsr")
        assert frozen.keys() == fresh.keys()
        for name in frozen.keys() - {":manifest"}:
            assert fresh[name].tobytes() == frozen[name].tobytes()
        # The description has gained a field since the first files were frozen; all have the usual width.
        old, new = (json.loads(zlib.decompress(streams[":manifest"])) for streams in (frozen, fresh))
        assert new["model"].pop("width") == old["model"].pop("width", 1) == 1
        assert new == old


def test_frozen_archives_hold_every_codec():
    from dsr_tool import open_archive
    from dsr_tool.formats.codecs import CODECS
    from dsr_tool.formats.grid import GRIDS

    codecs = {entry.codec for file in FILES for entry in open_archive(GOLDEN / f"{file}.dsr").entries.values()}
    assert codecs == {*CODECS, *GRIDS, "packed"}


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_reader_reads_a_fresh_archive(dtype, tmp_path):
    from dsr_tool.formats.archive import open_archive, write_archive
    from dsr_tool.graph.ir import Graph, Node, Value
    from dsr_tool.sparsity.config import ModelConfig
    from dsr_tool.sparsity.layers import LayerSpec
    from dsr_tool.sparsity.mask import Mask
    from dsr_tool.sparsity.tensor import SparseTensor

    random = np.random.default_rng(0)
    tensors, specs = {}, {}
    for i, density in enumerate((0.001, 0.02, 0.3, 0.6, 0.97, 1.0)):
        shape = (30 + i, 7, 5)
        mask = Mask.from_bool(random.random(shape) < density)
        tensors[f"w{i}"] = SparseTensor(mask, random.normal(size=mask.active).astype(dtype))
        specs[f"w{i}"] = LayerSpec(f"w{i}", shape, "Conv1d", "sparse", True, "weight")
        tensors[f"b{i}"] = SparseTensor(Mask.full((7,)), random.normal(size=7).astype(np.float32))
        specs[f"b{i}"] = LayerSpec(f"b{i}", (7,), "Conv1d", "dense", False, "bias")
    graph = Graph((Value("x", (None,)),), (Value("y", (None,)),), (Node("Relu", ("x",), ("y",)),), {}, (), 18)
    write_archive(tmp_path / "a.dsr", tensors, specs, graph, ModelConfig("module", "Net"))
    found, _ = read(tmp_path / "a.dsr")
    for name, array in open_archive(tmp_path / "a.dsr").dense().items():
        assert array.tobytes() == tensors[name].to_dense().tobytes() == found[name].tobytes()
