"""A small model, its archive, and a function that edits the manifest of an archive."""

import hashlib
import json
import zlib

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from dsr_tool.formats.archive import write_archive
from dsr_tool.graph.ir import Graph, Node, Value
from dsr_tool.sparsity.config import ModelConfig
from dsr_tool.sparsity.layers import LayerSpec
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor


@pytest.fixture
def small_model():
    """Returns tensors, specs, graph and description of one layer with a bias and a buffer."""
    rng = np.random.default_rng(0)
    mask = Mask.from_bool(rng.random((8, 40)) < 0.2)
    full = Mask((8,), np.arange(8))
    tensors = {
        "fc.weight": SparseTensor(mask, rng.normal(size=mask.active).astype(np.float32)),
        "fc.bias": SparseTensor(full, rng.normal(size=8).astype(np.float32)),
        "steps": SparseTensor(Mask((), np.arange(1)), np.array([3], np.int64)),
    }
    specs = {
        "fc.weight": LayerSpec("fc.weight", (8, 40), "Linear", "sparse", True, "weight of Linear", 1.0),
        "fc.bias": LayerSpec("fc.bias", (8,), "Linear", "dense", False, "bias of Linear"),
        "steps": LayerSpec("steps", (), "BatchNorm2d", "buffer", False, "buffer of BatchNorm2d"),
    }
    node = Node("Gemm", ("x", "fc.weight", "fc.bias"), ("y",), {"transB": 1})
    graph = Graph((Value("x", (None, 40)),), (Value("y", (None, 8)),), (node,), {}, ("fc.weight", "fc.bias"), 18)
    return tensors, specs, graph, ModelConfig("module", "Net", 8, (40,))


@pytest.fixture
def archive(tmp_path, small_model):
    """Returns the path of its archive."""
    path = tmp_path / "net.dsr"
    write_archive(path, *small_model)
    return path


@pytest.fixture
def rewrite():
    """Returns a function that changes manifest, streams and metadata of an archive and updates the checksum."""

    def rewritten(path, change, metadata=None, streams=None):
        with safe_open(path, framework="np") as file:
            header = json.loads(file.metadata()["dsr_archive"])
        arrays = {**load_file(path), **(streams or {})}
        manifest = json.loads(zlib.decompress(arrays[":manifest"].tobytes()))
        change(manifest)
        packed = zlib.compress(json.dumps(manifest).encode())
        arrays[":manifest"] = np.frombuffer(packed, np.uint8)
        header.update(manifest_sha256=hashlib.sha256(packed).hexdigest(), **(metadata or {}))
        save_file(arrays, path, metadata={"dsr_archive": json.dumps(header)})

    return rewritten
