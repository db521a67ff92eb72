"""Sessions of models that cannot be compiled, and sessions in several threads and processes."""

from __future__ import annotations

import gc
import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from dsr_tool.errors import FormatError, UsageError
from dsr_tool.formats.archive import write_archive
from dsr_tool.graph.ir import Graph, Node, Value
from dsr_tool.runtime import Session
from dsr_tool.runtime.compiler import layouts
from dsr_tool.runtime.compiler.machine import Machine
from dsr_tool.runtime.compiler.plan import Plan
from dsr_tool.runtime.coverage import Coverage, Fallback
from dsr_tool.runtime.kernels.library import library
from dsr_tool.runtime.onnxruntime_plan import OnnxRuntimePlan
from dsr_tool.runtime.reference.call import FUNCTIONS
from dsr_tool.sparsity.config import ModelConfig
from dsr_tool.sparsity.layers import LayerSpec
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor

KERNELS = pytest.mark.skipif(library() is None, reason="no kernels were built here")
NODES = (
    Node("Conv", ("x", "w"), ("a",), {"pads": (1, 1, 1, 1)}),
    Node("Relu", ("a",), ("b",)),
    Node("GlobalAveragePool", ("b",), ("c",)),
    Node("Flatten", ("c",), ("y",)),
)


def write(path: Path, nodes=NODES, shape=(None, 8, 12, 12), constants=None, density=0.1, seed=0) -> Path:
    rng = np.random.default_rng(seed)
    mask = rng.random((16, 8, 3, 3)) < density
    weight = SparseTensor(Mask.from_bool(mask), rng.standard_normal(int(mask.sum())).astype(np.float32))
    graph = Graph((Value("x", shape),), (Value("y", (None, 16)),), tuple(nodes), constants or {}, ("w",), 20)
    specs = {"w": LayerSpec("w", weight.mask.shape, "", "sparse", True, "")}
    write_archive(path, {"w": weight}, specs, graph, ModelConfig("module", "Net", 16, (8, 12, 12)))
    return path


def inputs(batch: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, 8, 12, 12)).astype(np.float32)


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * float(np.abs(expected).max(initial=1e-9)))


@KERNELS
def test_a_model_that_cannot_be_compiled_runs_on_scipy(tmp_path, monkeypatch):
    def refused(*_):
        raise FormatError("too much")

    path = write(tmp_path / "net.dsr")
    monkeypatch.setattr(Plan, "__init__", refused)
    session = Session(path)
    assert session.runtime == "scipy"
    assert session.coverage is None
    assert_close(session.run(inputs(2)), Session(path, runtime="scipy").run(inputs(2)))


@KERNELS
def test_shapes_that_depend_on_values_run_on_scipy(tmp_path):
    """The model returns as many rows as the first entry of its input says, so no compiled plan is valid."""
    nodes = [
        Node("Flatten", ("x",), ("f",)),
        Node("Slice", ("f", "zero", "one", "axis"), ("g",)),
        Node("Cast", ("g",), ("n",), {"to": 7}),
        Node("Reshape", ("n", "flat"), ("m",)),
        Node("Add", ("m", "one"), ("k",)),
        Node("Expand", ("row", "k"), ("r",)),
        Node("Relu", ("r",), ("y",)),
    ]
    constants = {
        "zero": np.array([0]), "one": np.array([1]), "axis": np.array([1]), "flat": np.array([-1]),
        "row": np.ones(1, np.float32),
    }  # fmt: skip
    session = Session(write(tmp_path / "net.dsr", nodes, constants=constants))
    x = inputs(1)
    for first in (0, 4, 1):
        x[0, 0, 0, 0] = first
        assert session.run(x).shape == (first + 1,)


@KERNELS
@pytest.mark.parametrize("size", [0, 1 << 60, None])
def test_inputs_without_a_usable_shape_are_not_compiled_before_the_first_run(tmp_path, size):
    session = Session(write(tmp_path / "net.dsr", shape=(None, 8, size, 12)))
    if size is None:
        assert session.run(inputs(1)).shape == (1, 16)
        return
    with pytest.raises(UsageError, match="does not fit"):
        session.run(inputs(1))


def test_a_negative_size_is_refused(tmp_path):
    with pytest.raises(FormatError, match=r"damaged: value 'x' has a negative size; export it again"):
        Session(write(tmp_path / "net.dsr", shape=(None, 8, -3, 12)))


@KERNELS
@pytest.mark.parametrize("sizes", [(-1,), (-1, -1), (7,)])
def test_values_of_weights_alone_are_computed_once_even_if_compiling_fails(tmp_path, monkeypatch, sizes):
    calls, results = [], []

    def counted(x):
        calls.append(x.shape)
        return np.exp(x)

    monkeypatch.setitem(FUNCTIONS, "Exp", counted)
    nodes = [Node("Exp", ("w",), ("e",)), Node("Reshape", ("e", "sizes"), ("r",)), Node("Add", ("x", "r"), ("y",))]
    path = write(tmp_path / "net.dsr", nodes, constants={"sizes": np.array(sizes)})
    for runtime in ("native", "scipy"):
        calls.clear()
        with pytest.raises(FormatError) as caught:
            Session(path, runtime=runtime).run(inputs(1))
        results.append(str(caught.value))
        assert len(calls) == 1
    assert results[0] == results[1]


@KERNELS
def test_kernels_run_if_onnxruntime_fails(tmp_path, monkeypatch):
    path = write(tmp_path / "net.dsr", density=1.0)
    session = Session(path)
    assert session.runtime == "onnxruntime"

    def fails(*_):
        raise FormatError("no")

    monkeypatch.setattr(OnnxRuntimePlan, "run", fails)
    assert_close(session.run(inputs(2)), Session(path, runtime="scipy").run(inputs(2)))


@KERNELS
def test_masks_are_freed_with_the_last_plan_that_uses_them(tmp_path):
    gc.collect()
    before = len(layouts._masks)
    paths = [write(tmp_path / f"{seed}.dsr", seed=seed) for seed in (1, 2)]
    sessions = [Session(paths[0])]
    held = len(layouts._masks)
    sessions.append(Session(paths[1]))
    assert before < held == len(layouts._masks)
    while sessions:
        sessions.pop().run(inputs(1))
    gc.collect()
    assert len(layouts._masks) == before


@KERNELS
def test_coverage_follows_the_plan_used_last(tmp_path):
    nodes = [Node("Conv", ("x", "w"), ("a",)), Node("Exp", ("a",), ("b",)), Node("Softmax", ("b",), ("y",))]
    session = Session(write(tmp_path / "net.dsr", nodes, shape=(None, 8, None, 12)))
    assert session.coverage is None  # there is no shape to compile for
    session.run(inputs(1))
    assert session.coverage == Coverage(3, (Fallback("Exp", "b", "no kernel"),))
    session.run(inputs(2)[:, :, :3])
    assert session.coverage.to_dict() == {"nodes": 3, "on_reference": 1, "operators": ["Exp"]}


@KERNELS
def test_there_is_no_coverage_without_kernels(tmp_path):
    path = write(tmp_path / "net.dsr", density=1.0)
    assert Session(path, runtime="native").coverage == Coverage(4)
    assert Session(path, runtime="scipy").coverage is None
    assert Session(path).coverage is None  # ONNX Runtime computes it


@pytest.mark.parametrize("threads", [1, 3])
def test_concurrent_sessions_do_not_disturb_each_other(tmp_path, threads):
    """Several threads use two sessions with changing batch sizes, so plans are compiled and dropped meanwhile."""
    paths = [write(tmp_path / f"{seed}.dsr", seed=seed) for seed in (1, 2)]
    sessions = [Session(path, threads=threads) for path in paths]
    expected = [Session(path, runtime="scipy").run(inputs(6)) for path in paths]

    def work(i: int) -> None:
        batch = 1 + i % 6
        assert_close(sessions[i % 2].run(inputs(6)[:batch]), expected[i % 2][:batch])

    with ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(work, range(48)))) == 48


@KERNELS
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="nothing forks here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_can_free_a_machine_without_its_threads():
    machine = [Machine(library(), 3)]
    child = multiprocessing.get_context("fork").Process(target=machine.clear)
    child.start()
    child.join(30)
    ended = child.exitcode
    child.kill()
    assert ended == 0


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        (
            [Node("Relu", ("b",), ("a",)), Node("Relu", ("a",), ("b",)), *NODES[2:]],
            "'b', which no node before it makes",
        ),
        ([Node("Relu", ("nowhere",), ("b",)), *NODES[2:]], "'nowhere', which no node before it makes"),
    ],
)
def test_cycles_and_undefined_values_are_refused(tmp_path, nodes, message):
    with pytest.raises(FormatError, match=message):
        Session(write(tmp_path / "net.dsr", nodes))


def test_strided_and_reversed_inputs_give_the_same_result(tmp_path):
    path = write(tmp_path / "net.dsr")
    batch = inputs(4)
    expected = Session(path).run(np.ascontiguousarray(batch[::-2, :, ::-1]))
    for x in (batch[::-2, :, ::-1], np.asfortranarray(batch[::-2, :, ::-1])):
        np.testing.assert_array_equal(Session(path).run(x), expected)
    with pytest.raises(UsageError, match="type >f4"):
        Session(path).run(batch.astype(">f4"))
