"""The memory of a plan is computed from the plan, byte for byte."""

from __future__ import annotations

import numpy as np
import pytest

from dsr_tool.graph.ir import Graph, Node, Value
from dsr_tool.runtime.compiler.plan import Plan
from dsr_tool.runtime.kernels.library import library
from dsr_tool.runtime.kernels.ops import LIMITS

pytestmark = pytest.mark.skipif(library() is None, reason="no kernels were built here")


def test_packed_weights_of_a_linear_layer_are_counted_by_record(machine, sparse):
    weight = sparse(np.random.default_rng(0), (30, 40), 0.2)
    nodes = (Node("Gemm", ("x", "w"), ("y",), {"transB": 1}),)
    graph = Graph((Value("x", (1, 40)),), (Value("y", ()),), nodes, {}, ("w",), 20)
    memory = Plan(graph, {"w": weight}, (1, 40), machine).memory()
    # 6 bytes for each value and its offset, 2 spare offsets, 8 bytes an entry, 40 a block and 32 a part.
    parts = min(machine.target.threads, 30)
    assert memory.weight_bytes == 6 * weight.mask.active + 4 + 8 * 30 + 72 * parts
    assert memory.array_bytes == 4 * 30
    assert memory.constant_bytes == 0


def test_weights_that_two_ops_share_are_counted_once(machine, sparse):
    weight = sparse(np.random.default_rng(0), (4, 4, 3, 3), 0.5)
    node = {"pads": (1, 1, 1, 1)}
    once = (Node("Conv", ("x", "w"), ("a",), node),)
    twice = (*once, Node("Conv", ("a", "w"), ("b",), node))
    sizes = []
    for nodes in (once, twice):
        output = Value(nodes[-1].outputs[0], ())
        graph = Graph((Value("x", (1, 4, 9, 9)),), (output,), nodes, {}, ("w",), 20)
        sizes.append(Plan(graph, {"w": weight}, (1, 4, 9, 9), machine).memory().weight_bytes)
    assert sizes[0] == sizes[1]


def test_a_bias_that_the_caller_keeps_is_counted_only_there(machine, sparse):
    random = np.random.default_rng(0)
    tensors = {"w": sparse(random, (30, 40), 0.2), "b": sparse(random, (30,), 1.0)}
    node = Node("Gemm", ("x", "w", "b"), ("y",), {"transB": 1})
    graph = Graph((Value("x", (1, 40)),), (Value("y", ()),), (node,), {}, ("w", "b"), 20)
    plan = Plan(graph, tensors, (1, 40), machine)
    alone, beside = plan.memory(), plan.memory(tensor.values for tensor in tensors.values())
    assert alone.table_bytes - beside.table_bytes == tensors["b"].values.nbytes == 120
    assert beside.weight_bytes == alone.weight_bytes


@pytest.mark.parametrize(
    ("nodes", "used"),
    [
        ((Node("Transpose", ("x",), ("t",), {"perm": (0, 2, 1)}), Node("MatMul", ("x", "t"), ("y",))), True),
        ((Node("Relu", ("x",), ("y",)),), False),
    ],
)
def test_the_scratch_of_the_threads_is_counted_where_an_op_uses_it(machine, nodes, used):
    graph = Graph((Value("x", (1, 4, 6)),), (Value("y", ()),), nodes, {}, (), 20)
    plan = Plan(graph, {}, (1, 4, 6), machine)
    (step,) = plan.steps
    expected = 4 * LIMITS["SCRATCH_FLOATS"] * machine.target.threads if used else 0
    assert plan.memory().arena_bytes - step.arena_bytes == expected


def test_arrays_between_segments_are_counted_while_they_are_alive(machine):
    nodes = (
        Node("Relu", ("x",), ("a",)),
        Node("Exp", ("a",), ("b",)),
        Node("Relu", ("b",), ("c",)),
        Node("Exp", ("c",), ("y",)),
    )
    graph = Graph((Value("x", (1, 100)),), (Value("y", ()),), nodes, {}, (), 20)
    memory = Plan(graph, {}, (1, 100), machine).memory()
    # A fallback releases its input after it made its output: b, c and y are alive together.
    assert memory.array_bytes == 3 * 400
    assert memory.arena_bytes > 0
    assert memory.total_bytes >= memory.array_bytes + memory.arena_bytes
