"""A session runs an archive, describes its model, and refuses inputs that do not fit."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from dsr_tool.errors import FileError, UsageError
from dsr_tool.formats.archive import open_archive, write_archive
from dsr_tool.graph.ir import Graph, Node, Value
from dsr_tool.runtime import Session
from dsr_tool.runtime.coverage import Coverage
from dsr_tool.runtime.kernels.library import library
from dsr_tool.sparsity.config import ModelConfig
from dsr_tool.sparsity.layers import LayerSpec
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor

RNG = np.random.default_rng(0)
WEIGHT = np.where(RNG.random((6, 3, 3, 3)) < 0.1, RNG.standard_normal((6, 3, 3, 3)), 0)
NORM = {name: RNG.uniform(0.5, 1.5, 6) for name in ("n.weight", "n.bias", "n.running_mean", "n.running_var")}
GRAPH = Graph(
    (Value("input", (None, 3, 8, 8)),),
    (Value("output", (None, 6)),),
    (
        Node("Conv", ("input", "c.weight"), ("c",), {"pads": (1, 1, 1, 1)}),
        Node("BatchNormalization", ("c", *NORM), ("n",)),
        Node("Relu", ("n",), ("r",)),
        Node("GlobalAveragePool", ("r",), ("p",)),
        Node("Flatten", ("p",), ("output",)),
    ),
    {},
    ("c.weight", *NORM),
    20,
)
X = RNG.standard_normal((4, 3, 8, 8)).astype(np.float32)


def write(path: Path, graph: Graph = GRAPH, dtype: str = "float32") -> Path:
    tensors = {
        name: SparseTensor.from_dense(array.astype(dtype), Mask.from_bool(array != 0))
        for name, array in {"c.weight": WEIGHT, **NORM}.items()
    }
    specs = {
        name: LayerSpec(name, tensor.mask.shape, "Conv2d", "sparse", True, "by type")
        for name, tensor in tensors.items()
    }
    write_archive(path, tensors, specs, graph, ModelConfig("module", "Net", 6, (3, 8, 8)))
    return path


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("archive") / "net.dsr")


def test_a_path_a_string_and_an_open_archive_give_the_same_results(archive):
    expected = Session(archive).run(X)
    assert expected.shape == (4, 6)
    assert expected.dtype == np.float32
    for source in (str(archive), open_archive(archive)):
        np.testing.assert_array_equal(Session(source).run(X), expected)


def test_each_input_of_a_batch_gives_its_own_output(archive):
    session = Session(archive)
    together = session.run(X)
    for i in range(len(X)):
        np.testing.assert_allclose(session.run(X[i : i + 1]), together[i : i + 1], rtol=1e-6)


def test_threads_may_share_a_session(archive):
    session = Session(archive)
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(session.run, [X] * 16):
            np.testing.assert_array_equal(result, session.run(X))


def test_a_session_describes_the_model(archive):
    session = Session(archive)
    assert session.config.architecture == "Net"
    assert session.input.shape == (None, 3, 8, 8)
    assert session.output.shape == (None, 6)


@pytest.mark.skipif(library() is None, reason="no kernels were built here")
def test_every_node_of_the_network_runs_on_a_kernel(archive):
    assert Session(archive, runtime="native").coverage == Coverage(4)


def test_float16_weights_compute_in_float32(tmp_path, archive):
    result = Session(write(tmp_path / "half.dsr", dtype="float16")).run(X)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, Session(archive).run(X), rtol=1e-2)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (X[0], r"shape \(3, 8, 8\) does not fit; the model expects \(batch, 3, 8, 8\)"),
        (X[:, :2], r"shape \(4, 2, 8, 8\)"),
        (X[..., :7], r"shape \(4, 3, 8, 7\)"),
        (X[:0], r"shape \(0, 3, 8, 8\)"),
        (X.astype(np.float64), "type float64 does not fit; the model expects float32"),
        ((X * 10).astype(np.uint8), "type uint8"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(archive, x, message):
    with pytest.raises(UsageError, match=message):
        Session(archive).run(x)


def test_a_missing_archive_is_refused_by_name(tmp_path):
    with pytest.raises(FileError, match=r"absent\.dsr"):
        Session(tmp_path / "absent.dsr")


def test_a_model_of_two_inputs_is_refused(tmp_path):
    two = Graph((*GRAPH.inputs, Value("more", (None,))), GRAPH.outputs, GRAPH.nodes, {}, GRAPH.parameters, 20)
    with pytest.raises(UsageError, match="takes 2 inputs"):
        Session(write(tmp_path / "two.dsr", two))


_CHILD = """
import pkgutil, sys
import dsr_tool.sparsity, dsr_tool.runtime
for package in (dsr_tool.sparsity, dsr_tool.runtime):
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        __import__(module.name)
import numpy
session = dsr_tool.runtime.Session(sys.argv[1])
session.run(numpy.zeros((1, 3, 8, 8), numpy.float32))
print(*sorted({"torch", "torchvision", "onnx", "onnxscript", "onnxruntime"} & set(sys.modules)))
"""


def test_sessions_import_no_framework(archive):
    child = subprocess.run([sys.executable, "-c", _CHILD, str(archive)], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    assert child.stdout.strip() == ""
