"""The reference computes elementwise operators like ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto

from converters.graph_network import GraphNetwork
from dsr_tool.errors import UsageError
from dsr_tool.graph.ir import Graph, Node, Value
from dsr_tool.runtime.compiler.plan import Plan
from dsr_tool.runtime.reference.call import FUNCTIONS
from dsr_tool.runtime.reference.interpreter import Interpreter

RNG = np.random.default_rng(0)
X = np.concatenate([RNG.standard_normal(500) * 4, [0, -0.0, 1, -1, 30, -30, 88, -88]]).astype(np.float32)
Y = RNG.permutation(X)
INTEGERS = np.array([-7, 7, -7, 7, 0, 5], np.int64)
DIVISORS = np.array([2, -2, -2, 2, 3, 5], np.int64)


@pytest.mark.parametrize(
    ("op", "attributes"),
    [
        ("Abs", {}),
        ("Ceil", {}),
        ("Celu", {}),
        ("Celu", {"alpha": 2.5}),
        ("Cos", {}),
        ("Dropout", {}),
        ("Elu", {}),
        ("Elu", {"alpha": 0.3}),
        ("Erf", {}),
        ("Exp", {}),
        ("Floor", {}),
        ("Gelu", {}),
        ("Gelu", {"approximate": "tanh"}),
        ("HardSigmoid", {}),
        ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.4}),
        ("HardSwish", {}),
        ("Identity", {}),
        ("LeakyRelu", {}),
        ("LeakyRelu", {"alpha": 0.2}),
        ("Mish", {}),
        ("Neg", {}),
        ("Reciprocal", {}),
        ("Relu", {}),
        ("Round", {}),
        ("Selu", {}),
        ("Selu", {"alpha": 1.2, "gamma": 0.7}),
        ("Sigmoid", {}),
        ("Sign", {}),
        ("Sin", {}),
        ("Softplus", {}),
        ("Softsign", {}),
        ("Tanh", {}),
        ("ThresholdedRelu", {}),
        ("ThresholdedRelu", {"alpha": 0.3}),
    ],
)
def test_operators_of_one_array_agree(agree, op, attributes):
    # ONNX Runtime approximates some of these, with errors of up to 2e-6 of the largest value.
    values = X[np.abs(X) < 20]
    agree(op, values.reshape(1, -1), rtol=2e-6, **attributes)


def test_halves_are_rounded_to_the_even_number(agree):
    agree("Round", np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5], np.float32))


@pytest.mark.parametrize("slope", [(3, 1, 1), (1,), (3, 4, 5), (2, 3, 4, 5)])
def test_slopes_below_zero_agree(agree, slope):
    x = X[:120].reshape(2, 3, 4, 5)
    agree("PRelu", x, RNG.random(slope).astype(np.float32))


@pytest.mark.parametrize("op", ["Sum", "Mean"])
def test_sums_and_means_of_several_arrays_agree(agree, op):
    agree(op, X)
    agree(op, X.reshape(2, -1), Y.reshape(2, -1), Y[:1], X[:2].reshape(2, 1), rtol=2e-5)


def test_extreme_values_give_no_warning(agree):
    agree("Sigmoid", X)
    agree("Sqrt", np.abs(X))
    agree("Log", np.abs(X))
    agree("Exp", np.array([-200, 200], np.float32))
    agree("Div", np.array([1, -1], np.float32), np.zeros(2, np.float32))


@pytest.mark.parametrize(
    "op", ["Add", "Sub", "Mul", "Div", "Max", "Min", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"]
)
def test_operators_of_two_arrays_agree(agree, op):
    agree(op, X.reshape(2, -1), Y[: X.size // 2])
    agree(op, INTEGERS.reshape(2, 3), DIVISORS.reshape(2, 3))
    agree(op, np.float32(3).reshape(()), np.float32(-2).reshape(()))


@pytest.mark.parametrize("op", ["And", "Or"])
def test_operators_of_two_booleans_agree(agree, op):
    agree(op, np.array([[True], [False]]), np.array([True, False]))


def test_pow_agrees(agree):
    agree("Pow", np.abs(X), np.float32(1.5).reshape(()))
    agree("Pow", X, np.float32(2).reshape(1))
    agree("Pow", X, np.array([3], np.int64))


def test_max_and_min_of_three_arrays_agree(agree):
    agree("Max", X, Y, X - Y)
    agree("Min", X, Y, X - Y)


def test_clip_agrees_with_each_set_of_limits(agree):
    low, high = np.float32(-1).reshape(()), np.float32(2).reshape(())
    agree("Clip", X)
    agree("Clip", X, low)
    agree("Clip", X, None, high)
    agree("Clip", X, low, high)


def test_where_and_not_agree(agree):
    chosen = RNG.random((2, 5)) < 0.5
    agree("Not", chosen)
    agree("Where", chosen, X[:5], Y[:10].reshape(2, 5))


@pytest.mark.parametrize("to", ["FLOAT", "DOUBLE", "FLOAT16", "INT32", "INT64", "INT8", "BOOL"])
def test_cast_agrees(agree, to):
    agree("Cast", np.array([-2.7, -0.5, 0, 0.5, 1, 100.9], np.float32), to=getattr(TensorProto, to))


def test_cast_like_agrees(agree):
    agree("CastLike", X[:5], np.zeros(1, np.int32))


def test_cast_to_an_unknown_type_is_refused():
    with pytest.raises(UsageError, match="type number 16"):
        FUNCTIONS["Cast"](X, to=TensorProto.BFLOAT16)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("last", [True, False])
def test_dropout_in_training_mode_is_refused_by_name(machine, known, last):
    """In the middle of a graph it would otherwise be removed as an identity."""
    nodes = [Node("Dropout", ("x", "", "on" if known else "some"), ("d",))]
    if not known:
        nodes = [Node("ReduceMax", ("x",), ("m",), {"keepdims": 0}), Node("Greater", ("m", "low"), ("some",)), *nodes]
    nodes += [] if last else [Node("Relu", ("d",), ("y",))]
    constants = {"on": np.array(True), "low": np.array(-9, np.float32)}
    graph = Graph((Value("x", (None, 4)),), (Value(nodes[-1].outputs[0], ()),), tuple(nodes), constants, (), 20)
    expected = r"operator Dropout \(output 'd'\).*training mode.*eval mode"
    x = np.ones((2, 4), np.float32)
    with pytest.raises(UsageError, match=expected):
        Interpreter(graph, {}).run(x)
    with pytest.raises(UsageError, match=expected):
        Plan(graph, {}, x.shape, machine).run(x)
    if known:
        with pytest.raises(UsageError, match=expected):
            GraphNetwork(graph, {}, (4,))


def test_dropout_with_its_training_mode_off_agrees(agree):
    agree("Dropout", X, np.array(0.5, np.float32), np.array(False))
