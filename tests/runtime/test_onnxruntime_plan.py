"""Plans of ONNX Runtime, and the choice of a runtime by a session."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from dsr_tool.errors import UsageError, unknown_name
from dsr_tool.formats.archive import write_archive
from dsr_tool.graph.ir import Graph, Node, Value
from dsr_tool.runtime import Session
from dsr_tool.runtime.kernels.library import library
from dsr_tool.runtime.onnxruntime_plan import OnnxRuntimePlan
from dsr_tool.runtime.reference.interpreter import Interpreter
from dsr_tool.sparsity.config import ModelConfig
from dsr_tool.sparsity.layers import LayerSpec
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor

KERNELS = pytest.mark.skipif(library() is None, reason="no kernels were built here")
RNG = np.random.default_rng(0)
X = RNG.standard_normal((3, 4, 9, 9)).astype(np.float32)


def graph(names: tuple[str, ...]) -> Graph:
    nodes = (
        Node("Conv", ("x", "w"), ("a",), {"pads": (1, 1, 1, 1), "auto_pad": "NOTSET"}),
        Node("LeakyRelu", ("a",), ("b",), {"alpha": 0.25}),
        Node("ReduceMean", ("b", "axes"), ("c",), {"keepdims": 0}),
        Node("Gemm", ("c", "l"), ("y",), {"transB": 1}),
    )
    return Graph(
        (Value("x", (None, 4, 9, 9)),), (Value("y", (None, 5)),), nodes, {"axes": np.array([-1, -2])}, names, 20
    )


def tensors(density: float) -> dict[str, SparseTensor]:
    rng = np.random.default_rng(1)
    weights = {}
    for name, shape in {"w": (16, 4, 3, 3), "l": (5, 16)}.items():
        mask = rng.random(shape) < density
        weights[name] = SparseTensor(Mask.from_bool(mask), rng.standard_normal(int(mask.sum())).astype(np.float32))
    return weights


def write(path: Path, density: float) -> Path:
    weights = tensors(density)
    specs = {name: LayerSpec(name, weights[name].mask.shape, "", "sparse", True, "") for name in weights}
    write_archive(path, weights, specs, graph(tuple(weights)), ModelConfig("module", "Net", 5, (4, 9, 9)))
    return path


def test_the_serialized_model_computes_what_the_reference_computes():
    weights = tensors(1.0)
    plan = OnnxRuntimePlan.of(graph(tuple(weights)), weights, 1)
    assert plan is not None
    np.testing.assert_allclose(
        plan.run(X)[0], Interpreter(graph(tuple(weights)), weights).run(X)[0], rtol=1e-5, atol=1e-6
    )


def test_there_is_no_plan_without_onnxruntime(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    weights = tensors(1.0)
    assert OnnxRuntimePlan.of(graph(tuple(weights)), weights, 1) is None


@KERNELS
@pytest.mark.parametrize(("density", "runtime"), [(1.0, "onnxruntime"), (0.05, "native")])
def test_auto_picks_onnxruntime_for_dense_models(tmp_path, density, runtime):
    path = write(tmp_path / "net.dsr", density)
    session = Session(path)
    assert session.runtime == runtime
    expected = Session(path, runtime="scipy").run(X)
    for each in (session, Session(path, runtime="native")):
        np.testing.assert_allclose(each.run(X), expected, rtol=1e-5, atol=1e-5 * float(np.abs(expected).max()))


def test_scipy_can_be_requested(tmp_path):
    assert Session(write(tmp_path / "net.dsr", 0.05), runtime="scipy").runtime == "scipy"


def test_native_is_refused_without_kernels(tmp_path, monkeypatch):
    monkeypatch.setattr("dsr_tool.runtime.session.library", lambda: None)
    path = write(tmp_path / "net.dsr", 0.05)
    with pytest.raises(UsageError, match="no kernels here"):
        Session(path, runtime="native")
    assert Session(path).runtime == "scipy"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"threads": 0}, "threads 0"), ({"threads": 10**4}, "threads 10000"), ({"batch": 0}, "batch 0")],
)
def test_invalid_arguments_are_refused(tmp_path, arguments, message):
    with pytest.raises(UsageError, match=message):
        Session(write(tmp_path / "net.dsr", 0.05), **arguments)


def test_an_unknown_runtime_is_refused_by_name(tmp_path):
    with pytest.raises(UsageError, match=str(unknown_name("runtime", "sicpy", ("auto", "native", "scipy")))[:20]):
        Session(write(tmp_path / "net.dsr", 0.05), runtime="sicpy")


@KERNELS
def test_a_session_compiled_for_one_batch_runs_any_other(tmp_path):
    path = write(tmp_path / "net.dsr", 0.05)
    session = Session(path, threads=2, batch=2)
    expected = Session(path, runtime="scipy").run(X)
    for n in (2, 3, 1, 3):
        np.testing.assert_allclose(session.run(X[:n]), expected[:n], rtol=1e-5, atol=1e-6)
