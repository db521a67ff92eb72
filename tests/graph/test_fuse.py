from __future__ import annotations

import numpy as np
import pytest

from dsr_tool.graph.fuse import fuse
from dsr_tool.graph.ir import Graph, Node, Value
from dsr_tool.runtime.reference.interpreter import Interpreter

X = np.linspace(-5, 5, 24, dtype=np.float32).reshape(2, 3, 4)
SLOPE = float(np.float32(1 / 6))  # as exporters write it


def gate(op: str = "Sigmoid", **attributes: float) -> Node:
    return Node(op, ("x",), ("g",), attributes)


def product(*inputs: str) -> Node:
    return Node("Mul", inputs or ("x", "g"), ("y",))


def result(*nodes: Node) -> np.ndarray:
    graph = Graph((Value("x", X.shape),), (Value("y", X.shape),), nodes, {}, (), 20)
    graph.check()
    return Interpreter(graph, {}).run(X)[0]


def fused(*nodes: Node) -> list[str]:
    """The operators of the fused nodes, which must compute what the nodes compute."""
    after = fuse(nodes, {}, ("y",))
    np.testing.assert_allclose(result(*after), result(*nodes), rtol=1e-6, atol=1e-6)
    return [node.op for node in after]


@pytest.mark.parametrize("inputs", [("x", "g"), ("g", "x")])
def test_a_gate_and_its_product_become_one_node(inputs):
    assert fused(gate(), product(*inputs)) == ["Swish"]
    assert fused(gate("HardSigmoid", alpha=SLOPE, beta=0.5), product(*inputs)) == ["HardSwish"]


@pytest.mark.parametrize("attributes", [{}, {"alpha": 0.25}, {"alpha": SLOPE, "beta": 0.4}, {"alpha": 1}])
def test_a_hard_sigmoid_of_another_slope_stays(attributes):
    assert fused(gate("HardSigmoid", **attributes), product()) == ["HardSigmoid", "Mul"]


def test_a_gate_with_another_reader_stays():
    nodes = (gate(), Node("Mul", ("x", "g"), ("p",)), Node("Add", ("p", "g"), ("y",)))
    assert fused(*nodes) == ["Sigmoid", "Mul", "Add"]


def test_a_gate_that_is_the_output_stays():
    nodes = (Node("Sigmoid", ("x",), ("y",)), Node("Mul", ("x", "y"), ("p",)))
    assert [node.op for node in fuse(nodes, {}, ("y",))] == ["Sigmoid", "Mul"]


def test_a_gate_of_another_value_stays():
    nodes = (Node("Relu", ("x",), ("r",)), gate(), product("r", "g"))
    assert fused(*nodes) == ["Relu", "Sigmoid", "Mul"]


def test_a_gate_times_itself_stays():
    assert fused(gate(), product("g", "g")) == ["Sigmoid", "Mul"]


def test_every_pair_is_fused_by_itself():
    nodes = (
        gate(),
        Node("Mul", ("g", "x"), ("a",)),
        Node("Sigmoid", ("a",), ("h",)),
        Node("Mul", ("a", "h"), ("y",)),
    )
    assert fused(*nodes) == ["Swish", "Swish"]


def test_identities_go_and_their_readers_read_their_input():
    nodes = (
        Node("Identity", ("x",), ("a",)),
        Node("Dropout", ("a",), ("b", "mask")),
        Node("Add", ("a", "b"), ("y",)),
    )
    (node,) = fuse(nodes, {}, ("y",))
    assert node == Node("Add", ("x", "x"), ("y",))


def test_a_dropout_with_a_training_mode_stays():
    nodes = [
        Node("Dropout", ("x", "", "t"), ("a",)),
        Node("Dropout", ("a", "r", ""), ("b",)),
        Node("Neg", ("b",), ("y",)),
    ]
    assert fuse(nodes, {"r", "t"}, ("y",)) == [nodes[0], Node("Neg", ("a",), ("y",))]


def test_an_identity_that_makes_the_output_stays():
    assert fused(Node("Relu", ("x",), ("r",)), Node("Identity", ("r",), ("y",))) == ["Relu", "Identity"]


def test_an_identity_of_a_weight_stays_to_be_folded():
    nodes = (Node("Identity", ("w",), ("a",)), Node("Add", ("x", "a"), ("y",)))
    assert fuse(nodes, {"w"}, ("y",)) == list(nodes)


def test_a_gate_behind_an_identity_is_found():
    assert fused(Node("Identity", ("x",), ("i",)), Node("Sigmoid", ("i",), ("g",)), product("g", "x")) == ["Swish"]
