"""Nodes that fuse leave no op of their own: results would be the same without fusing, and only slower."""

from __future__ import annotations

import numpy as np
import pytest

from dsr_tool.graph.ir import Node
from dsr_tool.runtime.compiler.plan import Plan
from dsr_tool.runtime.compiler.program import KernelStep
from dsr_tool.runtime.kernels.library import library
from dsr_tool.runtime.kernels.ops import Kind

pytestmark = pytest.mark.skipif(library() is None, reason="no kernels were built here")

RNG = np.random.default_rng(0)
IMAGE = RNG.standard_normal((1, 4, 40, 40)).astype(np.float32)
TOKENS = RNG.standard_normal((1, 5, 8)).astype(np.float32)
ROW = RNG.standard_normal((1, 8)).astype(np.float32)
ACTIVATIONS = ["Elu", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Relu", "Sigmoid", "Tanh"]

LAYOUTS = {
    "planes": (IMAGE, Node("Conv", ("x", "w"), ("a",)), (4, 4, 1, 1), Kind.SPMM),
    "rows": (TOKENS, Node("MatMul", ("x", "w"), ("a",)), (8, 8), Kind.SPMM),
    "one row": (ROW, Node("Gemm", ("x", "w"), ("a",), {"transB": 1}), (8, 8), Kind.GEMV),
}
"""A product in each layout: input, node, shape of its weight, and the kernel that computes it."""


def kinds(plan: Plan) -> list[Kind]:
    """Returns the kinds of all ops of a plan, in order."""
    return [Kind(op.kind) for step in plan.steps if isinstance(step, KernelStep) for op in step.ops]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", ACTIVATIONS)
def test_activations_fuse_into_a_product(machine, both, sparse, layout, op):
    x, product, shape, kind = LAYOUTS[layout]
    plan = both(machine, [product, Node(op, ("a",), ("y",))], {"w": sparse(RNG, shape, 0.5)}, x)
    assert kinds(plan).count(kind) == 1
    assert Kind.COMBINE not in kinds(plan)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_residual_fuses_into_the_later_product(machine, both, sparse, layout):
    x, product, shape, kind = LAYOUTS[layout]
    later = Node(product.op, ("a", "v"), ("b",), product.attributes)
    nodes = [product, later, Node("Add", ("b", "a"), ("c",)), Node("Relu", ("c",), ("y",))]
    plan = both(machine, nodes, {"w": sparse(RNG, shape, 0.5), "v": sparse(RNG, shape, 0.5)}, x)
    assert kinds(plan).count(kind) == 2
    assert Kind.COMBINE not in kinds(plan)


@pytest.mark.parametrize("layout", ["rows", "one row"])
def test_a_bias_fuses_into_a_product(machine, both, sparse, layout):
    x, product, shape, _ = LAYOUTS[layout]
    nodes = [product, Node("Add", ("a", "b"), ("c",)), Node("Gelu", ("c",), ("y",))]
    plan = both(machine, nodes, {"w": sparse(RNG, shape, 0.5), "b": sparse(RNG, shape[:1], 1.0)}, x)
    assert Kind.COMBINE not in kinds(plan)


def test_an_activation_fuses_into_arithmetic_and_into_a_scale(machine, both):
    halves = [Node("Tanh", ("x",), ("a",)), Node("Sigmoid", ("x",), ("b",))]
    plan = both(machine, [*halves, Node("Mul", ("a", "b"), ("c",)), Node("Relu", ("c",), ("y",))], {}, IMAGE)
    assert kinds(plan).count(Kind.COMBINE) == 3
    scale = [Node("GlobalAveragePool", ("x",), ("a",)), Node("Mul", ("x", "a"), ("b",)), Node("Relu", ("b",), ("y",))]
    assert Kind.COMBINE not in kinds(both(machine, scale, {}, IMAGE))


def test_a_value_that_others_read_is_not_replaced(machine, both, sparse):
    """The activation needs an op of its own, because the sum reads the product without it."""
    nodes = [
        Node("Conv", ("x", "w"), ("a",)),
        Node("Relu", ("a",), ("b",)),
        Node("Add", ("b", "a"), ("y",)),
    ]
    plan = both(machine, nodes, {"w": sparse(RNG, (4, 4, 1, 1), 0.5)}, IMAGE)
    assert kinds(plan).count(Kind.COMBINE) == 2


@pytest.mark.parametrize("op", ["Flatten", "Reshape"])
def test_a_change_of_shape_needs_no_op(machine, both, sparse, op):
    nodes = [
        Node("Gemm", ("x", "w"), ("a",), {"transB": 1}),
        Node(op, ("a", "shape") if op == "Reshape" else ("a",), ("b",)),
        Node("Gemm", ("b", "w"), ("y",), {"transB": 1}),
    ]
    plan = both(machine, nodes, {"w": sparse(RNG, (8, 8), 0.5)}, ROW, {"shape": np.array([1, -1])})
    assert kinds(plan) == [Kind.GEMV, Kind.GEMV]
