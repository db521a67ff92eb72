"""The limits of the compiler: forms that fall back, graphs that are refused, and memory that kernels must not read."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsr_tool.errors import FormatError, UsageError
from dsr_tool.graph.ir import Graph, Node, Value
from dsr_tool.runtime.compiler.plan import Plan
from dsr_tool.runtime.kernels.library import library
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor

pytestmark = pytest.mark.skipif(library() is None, reason="no kernels were built here")

RNG = np.random.default_rng(0)


def array(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from((1, 3, 5)), st.tuples(*[st.integers(0, 3)] * 4), st.integers(5, 29))
def test_a_plan_does_not_read_what_another_left_in_the_arena(machine, both, sparse, seed, kernel, pads, size):
    rng = np.random.default_rng(seed)
    for k, border, n in ((kernel, pads, size), (5, (0, 0, 1, 0), 5)):
        x = rng.standard_normal((1, 6, n, n)).astype(np.float32)
        both(machine, [Node("Conv", ("x", "w"), ("y",), {"pads": border})], {"w": sparse(rng, (2, 6, k, k), 0.3)}, x)


@pytest.mark.parametrize("rows", [21, 42, 83])
def test_channel_counts_that_fill_no_tile_are_computed(machine, both, sparse, rows):
    tensors = {"w": sparse(RNG, (rows, 5, 3, 3), 0.9), "v": sparse(RNG, (rows, rows, 3, 3), 0.2)}
    nodes = [Node("Conv", ("x", "w"), ("a",)), Node("Relu", ("a",), ("b",)), Node("Conv", ("b", "v"), ("y",))]
    both(machine, nodes, tensors, array(1, 5, 17, 13))


@pytest.mark.parametrize(
    ("size", "attributes"),
    [
        ((9, 9), {"dilations": (5000, 1), "pads": (5000, 1, 5000, 1)}),
        ((9, 9), {"pads": (0, 4500, 0, 0)}),
        ((300, 7), {"strides": (70, 70), "pads": (1, 1, 1, 1)}),
        ((3, 2500), {"dilations": (900, 1), "pads": (900, 1, 900, 1)}),
    ],
)
def test_windows_beyond_the_longest_offset_fall_back(machine, both, sparse, size, attributes):
    nodes = [
        Node("Conv", ("x", "w"), ("a",), attributes),
        Node("Relu", ("a",), ("b",)),
        Node("Conv", ("b", "v"), ("y",)),
    ]
    tensors = {"w": sparse(RNG, (3, 2, 3, 3), 0.5), "v": sparse(RNG, (2, 3, 1, 1), 0.5)}
    both(machine, nodes, tensors, array(1, 2, *size), fallback=("Conv",))


def test_large_pictures_run_on_kernels(machine, both, sparse):
    pads = {"pads": (1, 1, 1, 1), "strides": (2, 2)}
    nodes = [Node("Conv", ("x", "w"), ("a",), pads), Node("Conv", ("a", "v"), ("y",), pads)]
    tensors = {"w": sparse(RNG, (2, 1, 3, 3), 0.5), "v": sparse(RNG, (2, 2, 3, 3), 0.5)}
    both(machine, nodes, tensors, array(1, 1, 480, 480))


def test_a_weight_packed_for_one_use_is_not_taken_for_another(machine, both, sparse):
    tensors = {"w": sparse(RNG, (6, 6), 0.5), "k": sparse(RNG, (4, 2, 1, 1), 0.5)}
    nodes = [Node("Gemm", ("x", "w"), ("a",), {"transB": 1}), Node("MatMul", ("a", "w"), ("y",))]
    both(machine, nodes, tensors, array(5, 6))
    nodes = [
        Node("Conv", ("x", "k"), ("a",), {"group": 2}),
        Node("Slice", ("a", "begin", "end", "axis"), ("b",)),
        Node("Conv", ("b", "k"), ("y",), {"group": 1}),
    ]
    constants = {"begin": np.array([0]), "end": np.array([2]), "axis": np.array([1])}
    both(machine, nodes, tensors, array(1, 4, 6, 6), constants)


def test_a_first_axis_that_is_not_the_batch_is_not_split(machine, both, sparse):
    constants = {"pairs": np.array([2, 4, 1, 1]), "row": np.array([-1])}
    tensors = {"w": sparse(RNG, (3, 4, 1, 1), 0.7)}
    nodes = [Node("Reshape", ("x", "pairs"), ("a",)), Node("Conv", ("a", "w"), ("y",))]
    both(machine, nodes, tensors, array(1, 8), constants, fallback=("Conv",))
    nodes = [Node("Conv", ("x", "w"), ("a",)), Node("Reshape", ("a", "row"), ("b",)), Node("Softmax", ("b",), ("y",))]
    both(machine, nodes, tensors, array(3, 4, 1, 1), constants)
    both(machine, [Node("MatMul", ("x", "m"), ("y",))], {"m": sparse(RNG, (4, 3), 0.7)}, array(4))


def test_kernels_do_not_read_past_the_end_of_an_array_of_the_reference(machine, both, sparse):
    """Activations read whole vectors, and the array of five entries that the reference needs is shorter than one."""
    nodes = [
        Node("Gemm", ("x", "w"), ("a",), {"transB": 1}),
        Node("Relu", ("a",), ("b",)),
        Node("Exp", ("a",), ("c",)),
        Node("Add", ("b", "c"), ("y",)),
    ]
    both(machine, nodes, {"w": sparse(RNG, (5, 7), 0.5)}, array(1, 7), fallback=("Exp",))


@pytest.mark.parametrize("attributes", [{"alpha": "text"}, {"alpha": 10**400}, {"alpha": (1, 2)}, {"gamma": 1.0}])
def test_invalid_attributes_are_errors_that_name_the_operator(machine, attributes):
    graph = Graph(
        (Value("x", (1, 4)),), (Value("y", ()),), (Node("LeakyRelu", ("x",), ("y",), attributes),), {}, (), 20
    )
    with pytest.raises(FormatError, match="LeakyRelu"):
        Plan(graph, {}, (1, 4), machine)


@pytest.mark.parametrize(
    "attributes",
    [{"group": 2.0}, {"dilations": (1.0, 1.0)}, {"pads": (0.0, 1.0, 0.0, 1.0)}, {"strides": (1.0, 1.0)}],
)
def test_floats_in_place_of_integers_fall_back_or_are_refused(machine, sparse, attributes):
    group = int(attributes.get("group", 1))
    nodes = (Node("Conv", ("x", "w"), ("y",), {"kernel_shape": (3, 3), **attributes}),)
    tensors = {"w": sparse(RNG, (4, 4 // group, 3, 3), 0.5)}
    graph = Graph((Value("x", (1, 4, 6, 6)),), (Value("y", ()),), nodes, {}, ("w",), 20)
    try:
        fallbacks = Plan(graph, tensors, (1, 4, 6, 6), machine).coverage.fallbacks
        assert [entry.operator for entry in fallbacks] == ["Conv"]
    except FormatError as error:
        assert "Conv" in str(error)


@pytest.mark.parametrize("sizes", [np.array([2.0, 2.0]), np.array([-2, -2]), np.array([-1, -1])])
def test_impossible_sizes_are_refused(machine, sizes):
    nodes = (Node("Reshape", ("x", "s"), ("a",)), Node("Relu", ("a",), ("y",)))
    graph = Graph((Value("x", (1, 4)),), (Value("y", ()),), nodes, {"s": sizes}, (), 20)
    with pytest.raises(FormatError, match="Reshape"):
        Plan(graph, {}, (1, 4), machine)


def test_clip_with_swapped_limits_gives_the_upper_one(machine, both):
    pool = {"kernel_shape": (2, 2), "pads": (1, 1, 1, 1)}
    nodes = [Node("Clip", ("x", "low", "high"), ("a",)), Node("MaxPool", ("a",), ("y",), pool)]
    constants = {"low": np.float32([0])[0], "high": np.float32([-5])[0]}
    # The result is negative, so the zeros around pixels are none of the pool's.
    both(machine, nodes, {}, array(1, 2, 6, 6), constants)


@pytest.mark.parametrize("op", ["Shape", "Transpose", "Sigmoid", "Identity", "Conv", "Reshape", "Add", "Softmax"])
def test_operators_without_inputs_are_errors_that_name_the_operator(machine, op):
    nodes = (Node(op, (), ("a",)), Node("Mul", ("x", "a"), ("y",)))
    with pytest.raises((FormatError, UsageError), match=op):
        Plan(Graph((Value("x", (1, 4)),), (Value("y", ()),), nodes, {}, (), 20), {}, (1, 4), machine)


def test_an_unknown_operator_is_named_with_its_node(machine):
    graph = Graph((Value("x", (1, 4)),), (Value("y", ()),), (Node("Frobnicate", ("x",), ("y",)),), {}, (), 20)
    with pytest.raises(UsageError, match=r"operator Frobnicate \(output 'y'\) is not known"):
        Plan(graph, {}, (1, 4), machine)


def test_old_operator_sets_are_refused(machine):
    graph = Graph((Value("x", (1, 4)),), (Value("y", ()),), (Node("Softmax", ("x",), ("y",)),), {}, (), 11)
    with pytest.raises(UsageError, match="operator set 11"):
        Plan(graph, {}, (1, 4), machine)


def test_shapes_that_depend_on_values_are_refused_before_kernels_read(machine):
    nodes = (
        Node("Cast", ("x",), ("n",), {"to": 7}),
        Node("Add", ("n", "eight"), ("m",)),
        Node("Expand", ("row", "m"), ("a",)),
        Node("Relu", ("a",), ("y",)),
    )
    constants = {"eight": np.array([8]), "row": np.ones(1, np.float32)}
    plan = Plan(Graph((Value("x", (1,)),), (Value("y", ()),), nodes, constants, (), 20), {}, (1,), machine)
    assert plan.run(np.zeros(1, np.float32))[0].shape == (8,)
    with pytest.raises(FormatError, match="output shape of operator"):
        plan.run(np.full(1, -7, np.float32))


def test_weights_whose_dense_size_exceeds_int32_fall_back(machine, both):
    """Two active weights suffice for positions of 33 bits, so a small file can hold such a weight."""
    mask = Mask((70_000, 70_000), np.array([5, 70_000 * 69_999 + 69_999]))
    tensors = {"w": SparseTensor(mask, np.ones(2, np.float32))}
    nodes = [Node("Gemm", ("x", "w"), ("y",), {"transB": 1})]
    both(machine, nodes, tensors, np.ones((1, 70_000), np.float32), fallback=("Gemm",))


@pytest.mark.parametrize("density", [0.1, 0.9])
@pytest.mark.parametrize("special", [np.nan, np.inf])
def test_nan_and_inf_pass_through_a_linear_layer(machine, both, sparse, density, special):
    x = array(2, 40)
    x[1, 7] = special
    tensors = {"w": sparse(RNG, (9, 40), density)}
    for part in (x, x[1:]):
        both(machine, [Node("Gemm", ("x", "w"), ("y",), {"transB": 1})], tensors, part)
