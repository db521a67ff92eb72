"""The compiled kernels agree with the reference on small graphs, and compute every node of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsr_tool.graph.ir import Graph, Node, Value
from dsr_tool.runtime.compiler.machine import Machine
from dsr_tool.runtime.compiler.plan import Plan
from dsr_tool.runtime.kernels.library import library

pytestmark = pytest.mark.skipif(library() is None, reason="no kernels were built here")

DENSITIES = st.sampled_from((0.0, 0.02, 0.1, 0.3, 0.6, 0.8, 1.0))


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**32), st.sampled_from(((1, 1), (2, 2), (3, 3), (6, 6))), DENSITIES, st.booleans(),
    st.sampled_from(((1, 1), (3, 3), (2, 2), (5, 5), (3, 1), (1, 7))), st.integers(1, 3), st.integers(1, 2), st.data(),
)  # fmt: skip
def test_convolutions_agree(machine, both, sparse, seed, groups, density, with_bias, kernel, stride, dilation, data):
    rng = np.random.default_rng(seed)
    group, multiple = groups
    channels, rows = 6 * data.draw(st.integers(1, 3)), multiple * data.draw(st.integers(1, 4))
    rows = max(rows // group, 1) * group
    pads = data.draw(st.tuples(*[st.integers(0, 3)] * 4))
    reach = [(k - 1) * dilation + 1 for k in kernel]
    size = data.draw(st.tuples(*(st.integers(max(r - pads[i] - pads[i + 2], 1), 29) for i, r in enumerate(reach))))
    x = rng.standard_normal((data.draw(st.integers(1, 3)), channels, *size)).astype(np.float32)
    tensors = {"w": sparse(rng, (rows, channels // group, *kernel), density)}
    if with_bias:
        tensors["b"] = sparse(rng, (rows,), 1.0)
    attributes = {"group": group, "strides": (stride,) * 2, "pads": pads, "dilations": (dilation,) * 2}
    both(machine, [Node("Conv", ("x", *tensors), ("y",), attributes)], tensors, x)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(48, 70), st.integers(48, 70), DENSITIES, DENSITIES, st.integers(1, 2))
def test_chains_of_strided_convolutions_agree(machine, both, sparse, seed, height, width, first, second, batch):
    """All values lie on one grid, on which those before a stride have one plane for each of its phases."""
    rng = np.random.default_rng(seed)
    tensors = {
        "a": sparse(rng, (5, 3, 3, 3), first), "b": sparse(rng, (6, 5, 3, 3), second),
        "c": sparse(rng, (4, 6, 1, 1), second), "d": sparse(rng, (4, 5, 1, 1), first),
    }  # fmt: skip
    pads = {"pads": (1, 1, 1, 1)}
    nodes = [
        Node("Conv", ("x", "a"), ("p",), {**pads, "strides": (2, 2)}),
        Node("Relu", ("p",), ("q",)),
        Node("Conv", ("q", "b"), ("r",), {**pads, "strides": (2, 2)}),
        Node("Conv", ("r", "c"), ("s",), {}),
        Node("Conv", ("q", "d"), ("t",), {"strides": (2, 2)}),
        Node("Add", ("s", "t"), ("u",)),
        Node("Relu", ("u",), ("v",)),
        Node("MaxPool", ("v",), ("y",), {**pads, "kernel_shape": (3, 3), "strides": (2, 2)}),
    ]
    x = rng.standard_normal((batch, 3, height, width)).astype(np.float32)
    both(machine, nodes, tensors, x)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 300), st.integers(1, 300), DENSITIES, st.booleans())
def test_linear_layers_agree(machine, both, sparse, seed, batch, columns, rows, density, with_bias):
    rng = np.random.default_rng(seed)
    tensors = {"w": sparse(rng, (rows, columns), density)}
    if with_bias:
        tensors["b"] = sparse(rng, (rows,), 1.0)
    x = rng.standard_normal((batch, columns)).astype(np.float32)
    nodes = [Node("Gemm", ("x", *tensors), ("z",), {"transB": 1}), Node("Relu", ("z",), ("y",))]
    both(machine, nodes, tensors, x)


ACTIVATIONS = [
    ("Relu", {}), ("HardSwish", {}), ("HardSigmoid", {"alpha": 1 / 6}), ("Sigmoid", {}), ("Tanh", {}), ("Gelu", {}),
    ("Gelu", {"approximate": "tanh"}), ("Elu", {"alpha": 0.7}), ("LeakyRelu", {"alpha": 0.1}),
]  # fmt: skip


@pytest.mark.parametrize(("op", "attributes"), ACTIVATIONS)
@pytest.mark.parametrize("alone", [True, False])
def test_activations_agree_fused_and_alone(machine, both, sparse, op, attributes, alone):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((2, 4, 9, 11)) * 8).astype(np.float32)
    x[0, 0, 0, :6] = [0, -0.0, 100, -100, np.inf, -np.inf]
    tensors = {"w": sparse(rng, (4, 1, 1, 1), 1.0)}
    conv = [] if alone else [Node("Conv", ("x", "w"), ("c",), {"group": 4})]
    if op in ("Sigmoid", "HardSigmoid") or "Gelu" in op or op == "HardSwish":
        x = np.where(np.isfinite(x), x, 0).astype(np.float32)
    nodes = [
        *conv,
        Node(op, ("x" if alone else "c",), ("y",), attributes),
        Node("Conv", ("y", "w"), ("z",), {"group": 4}),
    ]
    both(machine, nodes, tensors, x)


def test_a_gate_and_its_product_become_one_node(machine, both, sparse):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 4, 7, 7)).astype(np.float32)
    tensors = {"w": sparse(rng, (4, 4, 1, 1), 0.5)}
    for op, attributes in (("Sigmoid", {}), ("HardSigmoid", {"alpha": 1 / 6})):
        nodes = [
            Node("Conv", ("x", "w"), ("c",)), Node(op, ("c",), ("g",), attributes), Node("Mul", ("c", "g"), ("y",)),
        ]  # fmt: skip
        assert both(machine, nodes, tensors, x).coverage.nodes == 2


def test_squeeze_and_excite_agrees(machine, both, sparse):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 8, 14, 13)).astype(np.float32)
    tensors = {
        "w": sparse(rng, (8, 8, 3, 3), 0.3),
        "s": sparse(rng, (2, 8, 1, 1), 0.5),
        "e": sparse(rng, (8, 2, 1, 1), 0.9),
    }
    nodes = [
        Node("Conv", ("x", "w"), ("c",), {"pads": (1, 1, 1, 1)}),
        Node("GlobalAveragePool", ("c",), ("p",)),
        Node("Conv", ("p", "s"), ("q",)),
        Node("Relu", ("q",), ("r",)),
        Node("Conv", ("r", "e"), ("t",)),
        Node("HardSigmoid", ("t",), ("u",)),
        Node("Mul", ("u", "c"), ("y",)),
    ]
    both(machine, nodes, tensors, x)


def windows_along(size: int, kernel: int, stride: int, pad: int, ceil: int) -> int:
    """Number of windows along one axis, by the ONNX standard."""
    span = size + 2 * pad - kernel
    count = (-(-span // stride) if ceil else span // stride) + 1
    # A window that would start in the padding at the end is left out.
    return count - 1 if ceil and (count - 1) * stride >= size + pad else count


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2), st.booleans(), st.integers(0, 1),
    st.tuples(st.integers(4, 30), st.integers(4, 30)),
)  # fmt: skip
def test_max_pools_over_padding_agree(machine, both, seed, kernel, stride, pad, positive, ceil, size):
    """Padding is zero in the strip layout and minus infinity in the standard: the same for values from zero on."""
    pad = min(pad, kernel - 1)
    x = np.random.default_rng(seed).standard_normal((2, 3, *size)).astype(np.float32)
    attributes = {"kernel_shape": (kernel,) * 2, "strides": (stride,) * 2, "pads": (pad,) * 4, "ceil_mode": ceil}
    relu = [Node("Relu", ("x",), ("r",))] if positive else []
    pool = Node("MaxPool", ("r" if positive else "x",), ("y",), attributes)
    both(machine, [*relu, pool], {}, x)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2), st.integers(0, 1),
    st.integers(0, 1), st.tuples(st.integers(4, 30), st.integers(4, 30)),
)  # fmt: skip
def test_average_pools_fall_back_if_windows_have_several_divisors(
    machine, both, seed, kernel, stride, pad, ceil, include, size
):
    pad = min(pad, kernel - 1)
    x = np.random.default_rng(seed).standard_normal((2, 3, *size)).astype(np.float32)
    attributes = {
        "kernel_shape": (kernel,) * 2, "strides": (stride,) * 2, "pads": (pad,) * 4, "ceil_mode": ceil,
        "count_include_pad": include,
    }  # fmt: skip
    longer = any(windows_along(n, kernel, stride, pad, ceil) != windows_along(n, kernel, stride, pad, 0) for n in size)
    fallback = ("AveragePool",) if longer or (pad and (ceil or not include)) else ()
    both(machine, [Node("AveragePool", ("x",), ("y",), attributes)], {}, x, fallback=fallback)


def test_fused_ops_do_not_change_a_value_that_others_read(machine, both, sparse):
    """An op that is fused into the one before it changes that op's result, which other nodes may read too."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 4, 10, 10)).astype(np.float32)
    tensors = {"w": sparse(rng, (4, 4, 3, 3), 0.4), "v": sparse(rng, (4, 4, 1, 1), 0.4)}
    pads = {"pads": (1, 1, 1, 1)}
    nodes = [
        Node("Conv", ("x", "w"), ("a",), pads),
        Node("Identity", ("a",), ("same",)),
        Node("Relu", ("same",), ("b",)),
        Node("Conv", ("b", "v"), ("c",)),
        Node("Add", ("c", "a"), ("d",)),
        Node("Mul", ("d", "d"), ("e",)),
        Node("Add", ("e", "c"), ("y",)),
    ]
    both(machine, nodes, tensors, x)


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_spread_only_to_the_pixels_that_read_them(machine, both, sparse, special):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 3, 12, 12)).astype(np.float32)
    x[0, 1, 5, 6] = special
    tensors = {"w": sparse(rng, (4, 3, 3, 3), 0.15)}
    nodes = [Node("Conv", ("x", "w"), ("c",), {"pads": (1, 1, 1, 1)}), Node("Relu", ("c",), ("y",))]
    both(machine, nodes, tensors, x)


def test_fallbacks_run_between_kernels(machine, both, sparse):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 4, 8, 8)).astype(np.float32)
    tensors = {"w": sparse(rng, (4, 4, 3, 3), 0.4), "l": sparse(rng, (5, 4 * 8 * 8), 0.1)}
    nodes = [
        Node("Conv", ("x", "w"), ("a",), {"pads": (1, 1, 1, 1)}),
        Node("Exp", ("a",), ("b",)),
        Node("Conv", ("b", "w"), ("c",), {"pads": (1, 1, 1, 1)}),
        Node("Add", ("c", "a"), ("d",)),
        Node("Transpose", ("d",), ("e",), {"perm": (0, 1, 3, 2)}),
        Node("Flatten", ("e",), ("f",)),
        Node("Gemm", ("f", "l"), ("y",), {"transB": 1}),
    ]
    both(machine, nodes, tensors, x, fallback=("Exp",))


def test_results_are_bit_identical_for_any_number_of_threads(sparse):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 16, 31, 29)).astype(np.float32)
    tensors = {"w": sparse(rng, (33, 16, 3, 3), 0.2)}
    graph = Graph((Value("x", x.shape),), (Value("y", ()),), (Node("Conv", ("x", "w"), ("y",)),), {}, ("w",), 20)
    results = [Plan(graph, tensors, x.shape, Machine(library(), threads)).run(x)[0] for threads in (1, 2, 5)]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])
