"""Norms that are written step by step become one node where they are complete, and stay everywhere else."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from dsr_tool.graph.fuse_norms import fuse_norms
from dsr_tool.graph.ir import Graph, Node, Value
from dsr_tool.runtime.reference.interpreter import Interpreter

RANDOM = np.random.default_rng(0)
KNOWN = {
    "last": np.array([-1], np.int64),
    "first": np.array([1], np.int64),
    "two": np.array(2, np.float32),
    "three": np.array(3, np.float32),
    "epsilon": np.array([1e-3], np.float32),
    "scale": RANDOM.standard_normal(6).astype(np.float32),
    "shift": RANDOM.standard_normal(6).astype(np.float32),
    "wide": RANDOM.standard_normal((5, 6)).astype(np.float32),
}
STEPS = {
    "mean": Node("ReduceMean", ("x", "last"), ("m",), {"keepdims": 1}),
    "difference": Node("Sub", ("x", "m"), ("d",)),
    "square": Node("Pow", ("d", "two"), ("p",)),
    "variance": Node("ReduceMean", ("p", "last"), ("v",)),
    "epsilon": Node("Add", ("v", "epsilon"), ("a",)),
    "root": Node("Sqrt", ("a",), ("s",)),
    "quotient": Node("Div", ("d", "s"), ("q",)),
    "factor": Node("Mul", ("q", "scale"), ("f",)),
    "summand": Node("Add", ("f", "shift"), ("y",)),
}
X = RANDOM.standard_normal((2, 5, 6)).astype(np.float32)


def changed(**inputs: tuple[str, ...]) -> list[Node]:
    return [dataclasses.replace(n, inputs=inputs[k]) if k in inputs else n for k, n in STEPS.items()]


def result(nodes: list[Node], output: str) -> np.ndarray:
    graph = Graph((Value("x", (None, 5, 6)),), (Value(output, ()),), tuple(nodes), KNOWN, (), 20)
    graph.check()
    return Interpreter(graph, {}).run(X)[0]


def fused(nodes: list[Node], *outputs: str) -> list[Node]:
    found = fuse_norms(nodes, KNOWN.get, outputs)
    for output in outputs:
        np.testing.assert_allclose(result(found, output), result(nodes, output), rtol=1e-5, atol=1e-6)
    return found


@pytest.mark.parametrize(
    "nodes",
    [
        list(STEPS.values()),
        changed(factor=("scale", "q"), summand=("shift", "f"), epsilon=("epsilon", "v")),
        [Node("Mul", ("d", "d"), ("p",)) if n.op == "Pow" else n for n in STEPS.values()],
    ],
)
def test_all_steps_become_one_node(nodes):
    (node,) = fused(nodes, "y")
    assert (node.op, node.inputs, node.outputs) == ("LayerNormalization", ("x", "scale", "shift"), ("y",))
    assert node.attributes == {"axis": -1, "epsilon": pytest.approx(1e-3)}


def test_a_summand_that_is_no_vector_stays():
    ops = [node.op for node in fused(changed(summand=("f", "wide")), "y")]
    assert ops == ["LayerNormalization", "Add"]
    assert [node.op for node in fused([*STEPS.values()][:-1], "f")] == ["LayerNormalization"]


@pytest.mark.parametrize(
    "nodes",
    [
        changed(mean=("x", "first")),
        changed(variance=("p", "first")),
        changed(square=("d", "three")),
        changed(square=("x", "two")),
        changed(difference=("m", "x")),
        changed(epsilon=("v", "m")),
        changed(factor=("q", "wide")),
        changed(factor=("q", "d")),
        [dataclasses.replace(n, op="Max") if n.outputs == ("d",) else n for n in STEPS.values()],
    ],
    ids=str,
)
def test_steps_of_something_else_stay(nodes):
    assert fused(nodes, "y") == nodes


@pytest.mark.parametrize("name", ["m", "d", "p", "v", "a", "s", "q"])
def test_a_value_in_between_that_is_read_elsewhere_keeps_its_steps(name):
    steps = list(STEPS.values())
    assert fused(steps, "y", name) == steps
    read = [*steps, Node("Neg", (name,), ("n",))]
    assert fused(read, "y", "n") == read


def test_a_factor_that_is_read_elsewhere_keeps_the_summand():
    assert [node.op for node in fused([*STEPS.values()], "y", "f")] == ["LayerNormalization", "Add"]


@pytest.mark.parametrize("name", STEPS)
def test_steps_with_another_number_of_inputs_are_left_to_the_reference(name):
    for inputs in ((), STEPS[name].inputs[:1], (*STEPS[name].inputs, "two", "two")):
        if len(inputs) != len(STEPS[name].inputs):
            nodes = changed(**{name: inputs})
            steps = fuse_norms(nodes, KNOWN.get, ["y"])
            assert nodes[list(STEPS).index(name)] in steps
