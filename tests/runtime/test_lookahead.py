"""The look-ahead of grids follows the operator table, so that strides after any activation are foreseen."""

from __future__ import annotations

import numpy as np
import pytest

from dsr_tool.graph.ir import Graph, Node, Value
from dsr_tool.graph.operators import OPERATORS
from dsr_tool.runtime.compiler.machine import Machine
from dsr_tool.runtime.compiler.plan import Plan
from dsr_tool.runtime.compiler.program import KernelStep
from dsr_tool.runtime.compiler.rules import RULES
from dsr_tool.runtime.kernels.library import library
from dsr_tool.runtime.kernels.ops import Kind
from dsr_tool.runtime.reference.interpreter import Interpreter

pytestmark = pytest.mark.skipif(library() is None, reason="no kernels were built here")

PADS = {"pads": (1, 1, 1, 1)}
STRIDED = {**PADS, "strides": (2, 2)}
SIZE = 224


def relayouts(plan: Plan) -> int:
    """Ops that move planes to planes of another grid."""
    ops = [op for step in plan.steps if isinstance(step, KernelStep) for op in step.ops]
    return sum(op.kind in (Kind.RELAYOUT, Kind.GATHER) and op.source_stride > 0 and op.out_stride > 0 for op in ops)


def stem(operator: str) -> list[Node]:
    """The first layers of most networks: two strided convolutions, each with an activation after it."""
    nodes = [Node("Conv", ("x", "w"), ("a",), STRIDED)]
    if OPERATORS[operator].max_inputs == 2:
        # Arithmetic on two values that come from the same strides.
        nodes += [
            Node("Sigmoid", ("a",), ("a2",)),
            Node(operator, ("a", "a2"), ("b",)),
        ]
    elif operator == "Swish":
        nodes += [Node("Sigmoid", ("a",), ("gate",)), Node("Mul", ("a", "gate"), ("b",))]
    else:
        nodes.append(Node(operator, ("a",), ("b",)))
    return [*nodes, Node("Conv", ("b", "v"), ("c",), STRIDED), Node("Relu", ("c",), ("y",))]


ELEMENTWISE = sorted(
    name for name, row in OPERATORS.items() if row.elementwise and row.min_inputs < 3 and name in RULES
)


def test_arithmetic_and_activations_are_looked_through():
    assert {"Add", "Clip", "Div", "HardSwish", "Mul", "Relu", "Sub", "Swish"} <= set(ELEMENTWISE)


@pytest.mark.parametrize("operator", ELEMENTWISE)
def test_a_stem_needs_no_relayout_whatever_its_activation(sparse, operator):
    rng = np.random.default_rng(0)
    tensors = {"w": sparse(rng, (4, 3, 3, 3), 0.5), "v": sparse(rng, (6, 4, 3, 3), 0.5)}
    shape = (1, 3, SIZE, SIZE)
    graph = Graph((Value("x", shape),), (Value("y", ()),), tuple(stem(operator)), {}, tuple(tensors), 20)
    plan = Plan(graph, tensors, shape, Machine(library(), 1))
    assert not plan.coverage.fallbacks
    assert relayouts(plan) == 0


def test_the_layout_of_a_value_ends_at_an_operator_without_a_rule(sparse):
    """Exp has no kernel: its result comes back as an array, so strides after it are no reason for a coarser grid."""
    rng = np.random.default_rng(0)
    tensors = {"w": sparse(rng, (4, 3, 3, 3), 0.5), "v": sparse(rng, (6, 4, 3, 3), 0.5)}
    nodes = [
        Node("Conv", ("x", "w"), ("a",), PADS),
        Node("Exp", ("a",), ("b",)),
        Node("Conv", ("b", "v"), ("y",), STRIDED),
    ]
    shape = (1, 3, SIZE, SIZE)
    graph = Graph((Value("x", shape),), (Value("y", ()),), tuple(nodes), {}, tuple(tensors), 20)
    plan = Plan(graph, tensors, shape, Machine(library(), 1))
    first = plan.steps[0]
    assert isinstance(first, KernelStep)
    assert {op.phases for op in first.ops if op.kind == Kind.SPMM} == {1}


@pytest.mark.parametrize(("channels", "moved"), [(16, 4), (3, 3)])
def test_pixels_are_moved_where_they_have_fewer_channels(sparse, channels, moved):
    """A depthwise stride follows a 1 x 1 kernel: pixels move before a kernel that adds channels, else after it."""
    rng = np.random.default_rng(0)
    tensors = {
        "v": sparse(rng, (4, 4, 3, 3), 0.5),
        "w": sparse(rng, (channels, 4, 1, 1), 0.5),
        "d": sparse(rng, (channels, 1, 3, 3), 0.9),
    }
    nodes = (
        Node("Conv", ("x", "v"), ("a",), PADS),
        Node("Conv", ("a", "w"), ("b",), {}),
        Node("Clip", ("b", "low", "high"), ("c",)),
        Node("Conv", ("c", "d"), ("y",), {**STRIDED, "group": channels}),
    )
    constants = {"low": np.float32(0), "high": np.float32(6)}
    graph = Graph((Value("x", (1, 4, 28, 28)),), (Value("y", ()),), nodes, constants, tuple(tensors), 20)
    x = rng.standard_normal((1, 4, 28, 28)).astype(np.float32)
    plan = Plan(graph, tensors, x.shape, Machine(library(), 1))
    assert not plan.coverage.fallbacks
    ops = [op for step in plan.steps if isinstance(step, KernelStep) for op in step.ops]
    moves = [op for op in ops if op.kind in (Kind.RELAYOUT, Kind.GATHER) and op.source_stride > 0 and op.out_stride > 0]
    assert [op.channels for op in moves] == [moved]
    expected = Interpreter(graph, tensors).run(x)[0]
    assert np.abs(plan.run(x)[0] - expected).max() <= 1e-5 * np.abs(expected).max()
