"""Liveness of activations against brute force, and sizes of weights against scipy."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from dsr_tool.graph.ir import Graph, Node, Value
from dsr_tool.measure.memory.activations import Size, at_batch, peak
from dsr_tool.measure.memory.inference import csr_weight_bytes
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor


def _graph(nodes):
    return Graph((Value("x", (None, 4)),), (Value(nodes[-1].outputs[0], (None, 4)),), tuple(nodes), {}, (), 20)


def _sizes(nodes, entries):
    names = ["x", *(node.outputs[0] for node in nodes)]
    return {name: Size((n,), 4, name) for name, n in zip(names, entries, strict=True)}


@st.composite
def computations(draw):
    count = draw(st.integers(1, 12))
    nodes = []
    for i in range(count):
        names = ["x", *(f"v{j}" for j in range(i))]
        reads = draw(st.lists(st.sampled_from(names), min_size=1, max_size=3))
        nodes.append(Node(draw(st.sampled_from(["Conv", "Add", "Relu", "Concat"])), tuple(reads), (f"v{i}",)))
    entries = draw(st.lists(st.sampled_from([1, 100, 100, 5000]), min_size=count + 1, max_size=count + 1))
    return _graph(nodes), _sizes(nodes, entries)


def _brute_force(graph, sizes):
    """At each node: the input, the output once computed, and all that is computed by now and read now or later."""
    moments = []
    for i, node in enumerate(graph.nodes):
        computed = {"x", *(n.outputs[0] for n in graph.nodes[: i + 1])}
        read_later = {name for n in graph.nodes[i:] for name in n.inputs}
        alive = {name for name in computed if name in read_later | {"x", graph.outputs[0].name, node.outputs[0]}}
        moments.append(sum(sizes[name].nbytes for name in alive))
    return max(moments)


@settings(max_examples=50)
@given(computations())
def test_peak_equals_brute_force(computation):
    graph, sizes = computation
    assert peak(graph, sizes).nbytes == _brute_force(graph, sizes)


def test_views_cost_nothing_and_scratch_counts():
    nodes = [Node("Relu", ("x",), ("a",)), Node("Reshape", ("a", "s"), ("b",)), Node("Relu", ("b",), ("c",))]
    sizes = {"x": Size((10,), 4, "x"), "a": Size((10,), 4, "a"), "b": Size((2, 5), 4, "a"), "c": Size((10,), 4, "c")}
    graph = _graph(nodes)
    assert peak(graph, sizes).nbytes == 120
    sizes["b"] = replace(sizes["b"], scratch_bytes=1000)
    assert peak(graph, sizes).nbytes == 120
    assert peak(graph, sizes, scratch=True).nbytes == 80 + 1000
    assert peak(graph, sizes, scratch=True).moment == "Reshape -> b"


def test_sizes_are_affine_in_the_batch():
    one = {"a": Size((1, 3, 8), 4, "a", 100), "windows": Size((49, 8), 4, "a")}
    two = {"a": Size((2, 3, 8), 4, "a", 110), "windows": Size((98, 8), 4, "a")}
    five = at_batch(one, two, 5)
    assert {name: size.shape for name, size in five.items()} == {"a": (5, 3, 8), "windows": (245, 8)}
    assert five["windows"].nbytes == 245 * 8 * 4
    assert five["a"].scratch_bytes == 140


@pytest.mark.parametrize("active", [30, 600])
def test_weight_bytes_equal_those_of_scipy(active):
    bits = np.zeros(40 * 27, bool)
    bits[np.random.default_rng(0).choice(bits.size, active, replace=False)] = True
    tensor = SparseTensor.from_dense(
        bits.reshape(40, 3, 3, 3).astype(np.float32), Mask.from_bool(bits.reshape(40, 3, 3, 3))
    )
    matrix = scipy.sparse.csr_array(bits.reshape(40, 27).astype(np.float32))
    expected = matrix.data.nbytes + matrix.indices.nbytes + matrix.indptr.nbytes if active == 30 else bits.size * 4
    assert csr_weight_bytes(tensor, max_density=0.2) == expected
