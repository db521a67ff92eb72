"""The report counts the nodes that no kernel computes, and has no count for files that cannot be compiled."""

import numpy as np
import pytest

from dsr_tool.formats.archive import write_archive
from dsr_tool.graph.ir import Graph, Node, Value
from dsr_tool.report.fallbacks import fallback_document
from dsr_tool.report.sources import read
from dsr_tool.runtime.kernels.library import library
from dsr_tool.sparsity.config import ModelConfig
from dsr_tool.sparsity.layers import LayerSpec
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor

KERNELS = pytest.mark.skipif(library() is None, reason="no kernels were built here")


def document_of(path, *nodes, shape=(None, 2, 6, 6)):
    """Returns the fallbacks in the report of an archive with a weight `w` of shape (3, 2, 3, 3)."""
    weight = SparseTensor(Mask.full((3, 2, 3, 3)), np.ones(54, np.float32))
    graph = Graph((Value("x", shape),), (Value("y", (None,)),), nodes, {}, ("w",), 20)
    specs = {"w": LayerSpec("w", (3, 2, 3, 3), "Conv2d", "sparse", True, "")}
    write_archive(path, {"w": weight}, specs, graph, ModelConfig("module", "Net", 3, (2, 6, 6)))
    return fallback_document(read(path))


CONV = Node("Conv", ("x", "w"), ("a",))


@KERNELS
def test_fallbacks_are_counted_and_named_once(tmp_path):
    nodes = (CONV, Node("Exp", ("a",), ("b",)), Node("Relu", ("b",), ("c",)), Node("Exp", ("c",), ("y",)))
    assert document_of(tmp_path / "net.dsr", *nodes) == {"nodes": 4, "on_reference": 2, "operators": ["Exp"]}


@KERNELS
def test_a_dense_model_is_compiled_too(tmp_path):
    """A session with `auto` would run it on ONNX Runtime, and have no count of kernels."""
    document = document_of(tmp_path / "net.dsr", CONV, Node("Relu", ("a",), ("y",)))
    assert document == {"nodes": 2, "on_reference": 0, "operators": []}


def test_models_that_cannot_be_compiled_are_reported_without_fallbacks(tmp_path):
    relu = Node("Relu", ("a",), ("y",))
    assert document_of(tmp_path / "free.dsr", CONV, relu, shape=(None, 2, None, 6)) is None
    assert document_of(tmp_path / "unknown.dsr", CONV, Node("Det", ("a",), ("y",))) is None


def test_without_kernels_no_fallbacks_are_reported(tmp_path, monkeypatch):
    monkeypatch.setattr("dsr_tool.runtime.session.library", lambda: None)
    assert document_of(tmp_path / "net.dsr", CONV, Node("Relu", ("a",), ("y",))) is None


def test_folders_and_files_of_matrices_have_no_graph_to_compile(model_folder, exported):
    assert fallback_document(read(model_folder)) is None
    assert fallback_document(read(exported["csr"])) is None
