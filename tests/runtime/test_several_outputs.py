"""Graphs of several outputs: every runtime returns all of them, in the order of the graph."""

import numpy as np
import pytest

from dsr_tool.graph.ir import Graph, Node, Value
from dsr_tool.runtime.compiler.machine import Machine
from dsr_tool.runtime.compiler.plan import Plan
from dsr_tool.runtime.kernels.library import library
from dsr_tool.runtime.onnxruntime_plan import OnnxRuntimePlan
from dsr_tool.runtime.reference.interpreter import Interpreter
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor
from exporters.onnx.session import OnnxSession
from exporters.onnx.write import to_onnx

PADS = {"pads": (1, 1, 1, 1)}
NODES = {
    "itself": Node("Identity", ("x",), ("itself",)),
    "conv": Node("Conv", ("x", "w"), ("conv",), PADS),
    "relu": Node("Relu", ("conv",), ("relu",)),  # would be fused into the first
    "gate": Node("Sigmoid", ("relu",), ("gate",)),
    "silu": Node("Mul", ("relu", "gate"), ("silu",)),  # would swallow the gate
    "same": Node("Identity", ("silu",), ("same",)),
    "pooled": Node("GlobalAveragePool", ("silu",), ("pooled",)),
    "joined": Node("Concat", ("silu", "silu"), ("joined",), {"axis": 0}),  # has no kernel on the first axis
    "after": Node("Neg", ("joined",), ("after",)),
    "fixed": Node("Neg", ("c",), ("fixed",)),
}


@pytest.fixture(scope="module")
def weight():
    w = np.random.default_rng(0).standard_normal((8, 4, 3, 3)).astype(np.float32)
    return SparseTensor.from_dense(w * (np.abs(w) > 1), Mask.from_bool(np.abs(w) > 1))


@pytest.mark.skipif(library() is None, reason="no kernels were built here")
@pytest.mark.parametrize(
    "names",
    [
        list(NODES),
        list(NODES)[::-1],
        ["pooled", "conv"],
        ["gate", "silu"],
        ["same", "silu", "itself"],
        ["fixed", "relu"],
        ["after", "joined", "relu"],
    ],
)
def test_all_outputs_are_those_of_onnxruntime(weight, names):
    constants = {"c": np.arange(3, dtype=np.float32)}
    x = np.random.default_rng(1).standard_normal((2, 4, 5, 5)).astype(np.float32)
    ranks = {"pooled": 4, "fixed": 1}
    outputs = tuple(Value(name, (None,) * ranks.get(name, 4)) for name in names)
    graph = Graph((Value("x", (None, 4, 5, 5)),), outputs, tuple(NODES.values()), constants, ("w",), 20)
    tensors = {"w": weight}
    expected = OnnxSession(to_onnx(graph, tensors, encoding="dense").SerializeToString()).run_all(x).values()
    plans = (
        Interpreter(graph, tensors),
        Plan(graph, tensors, x.shape, Machine(library(), 1)),
        OnnxRuntimePlan.of(graph, tensors, 1),
    )
    for plan in plans:
        for _ in range(2):  # what a caller does to a result must not reach the next run
            found = plan.run(x)
            assert len(found) == len(expected) == len(names)
            for i, other in enumerate(expected):
                np.testing.assert_allclose(found[i], other, rtol=1e-5, atol=1e-6)
                found[i][...] = 7
