"""Operators that move entries, in forms where what they move meets other ops: batches, fills, factors and limits."""

from __future__ import annotations

import numpy as np
import pytest

from dsr_tool.errors import FormatError
from dsr_tool.graph.ir import Graph, Node, Value
from dsr_tool.runtime.compiler.layouts import Flat
from dsr_tool.runtime.compiler.picked import Picked
from dsr_tool.runtime.compiler.picking import pick_to_flat
from dsr_tool.runtime.compiler.plan import Plan
from dsr_tool.runtime.kernels.library import library

pytestmark = pytest.mark.skipif(library() is None, reason="no kernels were built here")


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


# The first axis of both values is the batch. As arrays, that of the first one meets the second axis of the other.
@pytest.mark.parametrize("shape", [(2, 2, 1, 3, 1), (2, 1, 2, 3, 1)])
def test_a_batch_meets_another_axis_of_a_value_with_more_axes(machine, both, shape):
    nodes = [
        Node("Tanh", ("x",), ("a",)),
        Node("Reshape", ("a", "shape"), ("b",)),
        Node("Add", ("a", "b"), ("y",)),
    ]
    both(machine, nodes, {}, normal(2, 2, 3, 1), {"shape": ints(*shape)})


@pytest.mark.parametrize(
    "node",
    [
        Node("Where", ("all", "x", "fill"), ("a",)),
        Node("Pad", ("x", "less", "fill"), ("a",)),
    ],
    ids=lambda node: node.op,
)
@pytest.mark.parametrize(
    "reader",
    [
        Node("GlobalAveragePool", ("a",), ("y",)),
        Node("AveragePool", ("a",), ("y",), {"kernel_shape": (3, 3), "pads": (1,) * 4, "count_include_pad": 1}),
    ],
    ids=lambda node: node.op,
)
def test_a_fill_that_no_entry_has_is_not_read(machine, both, node, reader):
    constants = {
        "all": np.ones((1, 1, 1, 5), bool),
        "less": ints(0, 0, 0, 0, 0, 0, 0, -1),
        "fill": np.array(-7, np.float32),
    }
    both(machine, [node, reader], {}, normal(2, 3, 5, 5), constants)


@pytest.mark.parametrize(("op", "number", "scale"), [("Div", 1e-40, 1e-40), ("Mul", 1e30, 1e-38), ("Mul", 1e-30, 1e35)])
def test_factors_that_no_float_holds_are_not_multiplied(machine, both, op, number, scale):
    nodes = [
        Node("Transpose", ("x",), ("a",), {"perm": (0, 2, 1)}),
        Node(op, ("a", "number"), ("b",)),
        Node(op, ("b", "number"), ("c",)) if op == "Mul" else Node("Neg", ("b",), ("c",)),
    ]
    fallback = ["Neg"] if op == "Div" else []
    constants = {"number": np.array(number, np.float32)}
    both(machine, nodes, {}, np.ones((1, 3, 4), np.float32) * np.float32(scale), constants, fallback=fallback)


def test_a_number_of_more_axes_gives_a_selection_these_axes(machine, both):
    constants = {"condition": np.array([True, False, True]), "number": np.zeros((1, 1, 1, 1), np.float32)}
    both(
        machine, [Node("Where", ("condition", "x", "number"), ("y",))], {}, normal(2, 3), constants, fallback=["Where"]
    )


def test_a_slice_along_a_computed_axis_is_not_one_along_the_first(machine, both):
    nodes = [
        Node("ArgMax", ("x",), ("columns",), {"axis": 1, "keepdims": 0}),
        Node("Slice", ("columns", "zero", "one"), ("axis",)),
        Node("Slice", ("x", "last", "begin", "axis", "back"), ("y",)),
    ]
    constants = {"zero": ints(0), "one": ints(1), "last": ints(-1), "begin": ints(-9), "back": ints(-1)}
    x = np.array([[1, 2], [3, 4]], np.float32)
    both(machine, nodes, {}, x, constants, fallback=["ArgMax", "Slice", "Slice"])


LONG = tuple(Node("Concat", (f"v{i}",) * 512, (f"v{i + 1}",), {"axis": 3}) for i in range(4))


@pytest.mark.parametrize(
    "nodes",
    [
        (Node("Pad", ("x", "far"), ("y",)),),
        (Node("Expand", ("x", "many"), ("y",)),),
        (Node("Transpose", ("x",), ("v0",), {"perm": (0, 2, 1, 3)}), *LONG),
        (Node("Split", ("x",), ("y",), {"axis": 1, "num_outputs": 1 << 40}),),
    ],
    ids=["Pad", "Expand", "Concat", "Split"],
)
def test_a_plan_needs_no_more_memory_than_the_reference_may(machine, nodes):
    constants = {
        "far": ints(0, 0, 0, 0, 0, 0, 0, 1 << 40),
        "many": ints(1, 1, 1 << 40, 2),
    }
    x, output = np.ones((1, 1, 1, 2), np.float32), nodes[-1].outputs[0]
    graph = Graph((Value("x", x.shape),), (Value(output, ()),), nodes, constants, (), 20)
    with pytest.raises(FormatError):
        Plan(graph, {}, x.shape, machine)


@pytest.mark.parametrize("row", [65535, 65536])
def test_entries_too_far_apart_for_an_int32_are_refused_and_do_not_wrap(machine, row):
    """As int32 the second entry of the table would be negative, and its float would be a zero."""
    base = Flat((1, 1 << 17, 1 << 15), machine.lanes, 1)
    picked = Picked.of(base, base.shape).taken(1, ints(0, row)).taken(2, ints(7))
    op = pick_to_flat(picked, Flat((2,), machine.lanes, 1))
    if row << 15 < 1 << 31:
        assert op.parameters(machine.packer).fields["inner"].tolist() == [[0, row << 15]]
    else:
        with pytest.raises(FormatError, match="2,147,483,648 floats apart"):
            op.parameters(machine.packer)
