"""The time of each op: what a row says about it, and what is refused."""

import numpy as np
import pytest

from dsr_tool.errors import UsageError
from dsr_tool.graph.ir import Graph, Node, Value
from dsr_tool.measure.latency import Settings
from dsr_tool.measure.latency_layers_text import layers_text
from dsr_tool.runtime.compiler import plan as compiler
from dsr_tool.runtime.compiler.machine import Machine
from dsr_tool.runtime.compiler.plan import Plan
from dsr_tool.runtime.compiler.rules import RULES
from dsr_tool.runtime.kernels.library import library
from dsr_tool.runtime.kernels.peak import peak
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor

KERNELS = pytest.mark.skipif(library() is None, reason="no kernels")


@pytest.fixture
def plan(monkeypatch):
    """Returns a plan of a convolution, a node without a kernel and a linear layer; an input; the active weights."""
    monkeypatch.setattr(compiler, "RULES", {name: rule for name, rule in RULES.items() if name != "Sigmoid"})
    rng = np.random.default_rng(0)
    conv = rng.standard_normal((8, 4, 3, 3)).astype(np.float32) * (rng.random((8, 4, 3, 3)) < 0.25)
    head = rng.standard_normal((5, 8)).astype(np.float32)
    tensors = {
        "features.0.weight": SparseTensor.from_dense(conv, Mask.from_bool(conv != 0)),
        "fc.weight": SparseTensor.from_dense(head, Mask.from_bool(head != 0)),
    }
    nodes = (
        Node("Conv", ("x", "features.0.weight"), ("c",), {"kernel_shape": (3, 3), "pads": (1, 1, 1, 1)}),
        Node("Relu", ("c",), ("r",), {}),
        Node("Sigmoid", ("r",), ("m",), {}),
        Node("ReduceMean", ("m", "axes"), ("p",), {"keepdims": 0}),
        Node("Gemm", ("p", "fc.weight"), ("y",), {"transB": 1}),
    )
    constants = {"axes": np.array([2, 3])}
    graph = Graph((Value("x", (None, 4, 9, 9)),), (Value("y", (None, 5)),), nodes, constants, tuple(tensors), 20)
    x = rng.standard_normal((2, 4, 9, 9)).astype(np.float32)
    return Plan(graph, tensors, x.shape, Machine(library(), 1)), x, int((conv != 0).sum())


@KERNELS
def test_every_op_has_a_line_that_says_what_it_computes(plan):
    made, x, active = plan
    times = made.run_timed(x)
    by_layer = {op.origin.layer: op for op, _ in times if op.multiply_adds}
    conv, head = by_layer["features.0"], by_layer["fc"]
    assert (conv.kind, conv.origin.operator, conv.origin.node, conv.shape) == ("SPMM", "Conv", "c", (8, 9, 9))
    # 81 pixels of two images, and every active weight.
    assert conv.multiply_adds == 2 * 81 * active
    assert conv.tile > 0
    assert (conv.block, conv.blocks, conv.with_zeros) == (4, 1, False)
    assert conv.density == pytest.approx(active / 288)
    assert head.multiply_adds == 2 * 40
    assert all(nanoseconds >= 0 for _, nanoseconds in times)
    assert sum(nanoseconds for _, nanoseconds in times) > 0


@KERNELS
def test_what_the_reference_computes_is_named_and_timed(plan):
    made, x, _ = plan
    (fallback,) = [one for one in made.run_timed(x) if one.op.on_reference]
    assert (fallback.op.kind, fallback.op.origin.operator, fallback.op.shape) == ("reference", "Sigmoid", (8, 9, 9))
    assert fallback.nanoseconds > 0


@KERNELS
def test_a_timed_run_computes_what_a_run_computes(plan):
    made, x, _ = plan
    expected, values = made.run(x)[0], {"x": x}
    for step in made.steps:
        step.run_timed(values)
    assert np.array_equal(values["y"], expected)


@KERNELS
def test_the_peak_is_above_what_any_op_reaches():
    assert 1 < peak() < 10_000


def layers(**changes):
    row = {
        "kind": "SPMM", "operator": "Conv", "node": "c", "layer": "features.0", "on_reference": False,
        "shape": [8, 9, 9], "layout": "11 + 4 vectors", "tile": 11, "block": 4, "blocks": 2, "density": 0.25,
        "with_zeros": False, "multiply_adds": 10**6, "seconds": 1e-3, "share": 0.5, "gflops": 2.0, "peak_share": 0.02,
    }  # fmt: skip
    other = dict.fromkeys(("layer", "density", "gflops", "peak_share")) | {"layout": "", "tile": 0, "blocks": 0}
    fallback = row | other | {"kind": "reference", "operator": "Sigmoid", "node": "m", "on_reference": True}
    return {
        "whole_s": 2.1e-3, "ops_s": 2e-3, "reference_s": 1e-3, "peak_gflops": 100.0, "gflops": 1.0,
        "ops": [row, fallback], **changes,
    }  # fmt: skip


def test_the_table_has_a_line_for_each_op_and_the_whole():
    text = layers_text(layers())
    assert "features.0" in text
    assert "4 x 2" in text
    assert "reference Sigmoid" in text
    assert "all ops 2.00 ms of 2.10 ms" in text
    assert "1.0 GFLOP/s with active weights, 1% of the 100" in text
    assert "1 node on the reference took 1.00 ms" in text
    assert "on the reference" not in layers_text(layers(reference_s=0.0))


def test_layers_need_the_kernels():
    with pytest.raises(UsageError, match="--layers times the kernels, which --runtime scipy does not run"):
        Settings(runtime="scipy", layers=True).check()
