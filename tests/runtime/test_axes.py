"""An axis that a value lacks is refused by the operator and the axis, by the reference, the compiler and in PyTorch."""

from __future__ import annotations

import numpy as np
import pytest

from converters.graph_network import GraphNetwork
from dsr_tool.errors import FormatError, UsageError
from dsr_tool.graph.axes import axes_of, axis_of
from dsr_tool.graph.ir import Graph, Node, Value
from dsr_tool.runtime.compiler.plan import Plan
from dsr_tool.runtime.reference.interpreter import Interpreter

SHAPE = (2, 4, 6, 6)
OTHERS = {
    "zero": np.array([0], np.int64),
    "one": np.array([1], np.int64),
    "scale": np.ones(6, np.float32),
    "pads": np.array([1, 1], np.int64),
    "sizes": np.array([6], np.int64),
}
BY_ATTRIBUTE = {
    "ArgMax": ("x",),
    "Concat": ("x", "x"),
    "Flatten": ("x",),
    "Gather": ("x", "zero"),
    "LayerNormalization": ("x", "scale"),
    "LogSoftmax": ("x",),
    "Softmax": ("x",),
    "Split": ("x",),
}
BY_INPUT = {
    "Pad": ("x", "pads", "", "axes"),
    "ReduceMax": ("x", "axes"),
    "ReduceMean": ("x", "axes"),
    "ReduceSum": ("x", "axes"),
    "Slice": ("x", "zero", "one", "axes"),
    "Squeeze": ("x", "axes"),
    "Unsqueeze": ("x", "axes"),
}
NOT_IN_TORCH = ("ArgMax",)


def graph_of(op: str, axis: int) -> Graph:
    attributes: dict[str, object] = {"axis": axis} if op in BY_ATTRIBUTE else {}
    if op == "Split":
        attributes["num_outputs"] = 1
    inputs = BY_ATTRIBUTE.get(op) or BY_INPUT[op]
    constants = {**OTHERS, "axes": np.array([axis], np.int64)}
    node = Node(op, inputs, ("y",), attributes)
    return Graph((Value("x", (None, *SHAPE[1:])),), (Value("y", ()),), (node,), constants, (), 20)


@pytest.mark.parametrize("axis", [6, 9, -7, -10])
@pytest.mark.parametrize("op", [*BY_ATTRIBUTE, *BY_INPUT])
def test_an_axis_that_a_value_lacks_is_refused_by_name(machine, op, axis):
    graph = graph_of(op, axis)
    expected = rf"operator {op} \(output 'y'\).* axis {axis} is not in \[-\d, \d\)"
    with pytest.raises(FormatError, match=expected):
        Interpreter(graph, {}).run(np.zeros(SHAPE, np.float32))
    with pytest.raises(FormatError, match=expected):
        Plan(graph, {}, SHAPE, machine)
    if op not in NOT_IN_TORCH:
        with pytest.raises(UsageError, match=expected):
            GraphNetwork(graph, {}, SHAPE[1:])


@pytest.mark.parametrize("op", [op for op in BY_INPUT if op != "Unsqueeze"])
def test_an_axis_given_twice_is_refused_by_name(machine, op):
    graph = graph_of(op, 0)
    twice = {"axes": np.array([1, -3], np.int64), "zero": np.zeros(2, np.int64), "one": np.ones(2, np.int64)}
    graph.constants.update({**twice, "pads": np.ones(4, np.int64)})
    with pytest.raises(FormatError, match=rf"operator {op} .*name one axis twice"):
        Plan(graph, {}, SHAPE, machine)


@pytest.mark.parametrize("axis", [2, -3])
def test_resize_along_an_axis_that_a_value_lacks_is_refused(axis):
    node = Node("Resize", ("x", "", "", "sizes"), ("y",), {"axes": (axis,)})
    graph = Graph((Value("x", (None, 4)),), (Value("y", ()),), (node,), OTHERS, (), 20)
    with pytest.raises(FormatError, match=rf"Resize .*axis {axis} is not in \[-2, 2\)"):
        Interpreter(graph, {}).run(np.zeros((1, 4), np.float32))


@pytest.mark.parametrize("perm", [(0, 1, 2, 4), (0, 1, 2), (0, 1, 2, -1), (0, 1, 1, 2)])
def test_an_order_of_other_axes_is_refused(machine, perm):
    node = Node("Transpose", ("x",), ("y",), {"perm": perm})
    graph = Graph((Value("x", (None, *SHAPE[1:])),), (Value("y", ()),), (node,), {}, (), 20)
    with pytest.raises(FormatError, match="Transpose .*is no order of the axes 0 to 3"):
        Plan(graph, {}, SHAPE, machine)


@pytest.mark.parametrize("batch_dims", [-1, 2, 9])
def test_gather_nd_with_impossible_batch_axes_is_refused(machine, batch_dims):
    node = Node("GatherND", ("x", "table"), ("y",), {"batch_dims": batch_dims})
    table = {"table": np.zeros((2, 1), np.int64)}
    graph = Graph((Value("x", (None, *SHAPE[1:])),), (Value("y", ()),), (node,), table, (), 20)
    with pytest.raises(FormatError, match=rf"GatherND .*batch_dims {batch_dims} is not in \[0, 2\)"):
        Plan(graph, {}, SHAPE, machine)


def test_axes_count_from_both_ends():
    assert axes_of([-1, 0, 1], 3) == [2, 0, 1]
    assert axis_of(-3, 3) == 0
    with pytest.raises(FormatError, match=r"axis 0 is not in \[-0, 0\)"):
        axis_of(0, 0)
