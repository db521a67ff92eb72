"""A reader written from docs/format.md alone, with the container's own library, on frozen files."""

import hashlib
import importlib.util
import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

GOLDEN = Path(__file__).parent / "golden"


def bits(packed, size):
    return np.flatnonzero(np.unpackbits(packed)[:size])


def positions_of_runs(runs):
    found, p = [], -1
    for byte in runs:
        p += 255 if byte == 255 else byte + 1
        if byte != 255:
            found.append(p)
    return np.array(found, int)


def unplane(stream, active, dtype):
    width, at, planes = np.dtype(dtype).itemsize, 0, []
    for _ in range(width):
        length = int.from_bytes(stream[at : at + 8], "little")
        plane = stream[at + 8 : at + 8 + length]
        planes.append(plane if length == active else zlib.decompress(plane, wbits=-15))
        at += 8 + length
    rotated = np.stack([np.frombuffer(plane, np.uint8) for plane in planes], 1).copy().view(f"<u{width}")[:, 0]
    return ((rotated >> 1) | (rotated << (8 * width - 1))).view(dtype)


def decode(entry, stream):
    size, active, dtype = math.prod(entry["shape"]), entry["active"], entry["dtype"]
    dense = np.zeros(size, dtype)
    if entry["codec"] == "dense":
        return stream("").reshape(entry["shape"])
    if entry["codec"] == "bitmask":
        where, values = bits(stream("mask"), size), stream("values")
    elif entry["codec"] == "csr":
        indptr, columns = stream("indptr"), size // entry["shape"][0]
        rows = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
        where, values = rows * columns + stream("indices"), stream("values")
    else:
        where = positions_of_runs(zlib.decompress(stream("mask").tobytes(), wbits=-15))
        if 2 * active > size:
            where = np.setdiff1d(np.arange(size), where)
        values = unplane(stream("values").tobytes(), active, dtype)
    dense[where] = values
    return dense.reshape(entry["shape"])


def read(path):
    with safe_open(path, framework="np") as file:
        header = json.loads(file.metadata()["dsr_archive"])
        packed = file.get_tensor(":manifest").tobytes()
        assert header["version"].split(".")[0] == "1"
        assert hashlib.sha256(packed).hexdigest() == header["manifest_sha256"]
        manifest = json.loads(zlib.decompress(packed))
        graph = file.get_tensor(":graph").tobytes()
        assert zlib.crc32(graph) == manifest["graph_crc32"]
        tensors = {}
        for entry in manifest["tensors"]:

            def stream(suffix, entry=entry):
                array = file.get_tensor(f"{entry['name']}:{suffix}" if suffix else entry["name"])
                assert zlib.crc32(array.tobytes()) == entry["crc32"][suffix]
                return array

            tensors[entry["name"]] = decode(entry, stream)
    return tensors, json.loads(zlib.decompress(graph))


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("golden_make", GOLDEN / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("encoding", ["delta", "bitmask", "csr", "dense"])
def test_the_document_is_enough_to_read_an_archive(recipe, encoding):
    tensors, graph = read(GOLDEN / f"{encoding}.dsr")
    assert set(tensors) == set(recipe.SHAPES)
    for name, shape in recipe.SHAPES.items():
        expected = np.zeros(math.prod(shape), np.float32)
        expected[recipe.active(name)] = recipe.values(name)
        assert tensors[name].tobytes() == expected.reshape(shape).tobytes()
    assert graph["nodes"][0]["op"] == "Gemm"


@pytest.mark.parametrize("encoding", ["delta", "bitmask", "csr", "dense"])
def test_frozen_archives_stay_readable(recipe, encoding):
    from dsr_tool import open_archive

    archive = open_archive(GOLDEN / f"{encoding}.dsr")
    for name, tensor in archive:
        np.testing.assert_array_equal(tensor.mask.positions, recipe.active(name))
        assert tensor.values.tobytes() == recipe.values(name).tobytes()
    np.testing.assert_array_equal(archive.graph.constants["k"], [1, -2])
