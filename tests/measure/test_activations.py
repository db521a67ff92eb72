"""Liveness, fusion and the arena, against brute force and scipy."""

import itertools

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from dsr_tool.graph.ir import Graph, Node, Value
from dsr_tool.measure.memory.arena import Arena, arena_bytes, pattern_bytes
from dsr_tool.measure.memory.peak import Size, at_batch, csr_weight_bytes, fused_steps, in_order_steps, peak
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
    """At each node: the input, the output once made, and all that is made up to here and read here or later."""
    moments = []
    for i, node in enumerate(graph.nodes):
        made = {"x", *(n.outputs[0] for n in graph.nodes[: i + 1])}
        read_later = {name for n in graph.nodes[i:] for name in n.inputs}
        alive = {name for name in made if name in read_later | {"x", graph.outputs[0].name, node.outputs[0]}}
        moments.append(sum(sizes[name].nbytes for name in alive))
    return max(moments)


@settings(max_examples=50)
@given(computations())
def test_peak_is_what_brute_force_finds(computation):
    graph, sizes = computation
    assert peak(graph, in_order_steps(graph, sizes), sizes).nbytes == _brute_force(graph, sizes)


@settings(max_examples=50)
@given(computations())
def test_fusing_and_computing_in_place_drops_nothing(computation):
    graph, sizes = computation
    steps, shared = fused_steps(graph, sizes)
    fused = peak(graph, steps, shared)
    assert shared[graph.outputs[0].name].storage in {name for step in steps for name in step.writes}
    made = {"x"}
    for step in steps:
        assert set(step.reads) <= made | set(step.writes)
        made.update(step.writes)
    assert arena_bytes(graph, steps, shared) + 4096 * len(steps) >= fused.nbytes - sum(
        sizes[name].nbytes for name in {"x", graph.outputs[0].name}
    )


def test_a_sum_and_an_activation_go_into_the_later_convolution_and_in_place():
    nodes = [
        Node("Conv", ("x", "w"), ("a",)),
        Node("Relu", ("a",), ("b",)),
        Node("Conv", ("b", "w"), ("c",)),
        Node("Add", ("c", "b"), ("d",)),
        Node("Relu", ("d",), ("e",)),
        Node("Sigmoid", ("e",), ("f",)),
        Node("Concat", ("f", "f"), ("g",)),
    ]
    sizes = _sizes(nodes, [1000] * 7 + [2000])
    steps, shared = fused_steps(_graph(nodes), sizes)
    assert [step.node.op for step in steps] == ["Conv", "Conv", "Sigmoid", "Concat"]
    assert shared["e"].storage == shared["f"].storage == "b"  # the sum is made where one of its sides was
    assert peak(_graph(nodes), steps, shared).nbytes == 4 * (1000 + 1000 + 2000)
    assert peak(_graph(nodes), in_order_steps(_graph(nodes), sizes), sizes).nbytes == 4 * (1000 + 3 * 1000)


def test_views_cost_nothing_and_scratch_counts():
    nodes = [Node("Relu", ("x",), ("a",)), Node("Reshape", ("a", "s"), ("b",)), Node("Relu", ("b",), ("c",))]
    sizes = {"x": Size((10,), 4, "x"), "a": Size((10,), 4, "a"), "b": Size((2, 5), 4, "a"), "c": Size((10,), 4, "c")}
    graph = _graph(nodes)
    assert peak(graph, in_order_steps(graph, sizes), sizes).nbytes == 120
    with_scratch = in_order_steps(graph, sizes, lambda node: 1000 if node.op == "Reshape" else 0)
    assert peak(graph, with_scratch, sizes).nbytes == 80 + 1000
    assert peak(graph, with_scratch, sizes).moment == "Reshape -> b"


def test_sizes_at_any_batch():
    first = {"a": Size((1, 3, 8), 4, "a"), "windows": Size((49, 8), 4, "a")}
    second = {"a": Size((2, 3, 8), 4, "a"), "windows": Size((98, 8), 4, "a")}
    assert {name: size.shape for name, size in at_batch(first, second, 5).items()} == {
        "a": (5, 3, 8),
        "windows": (245, 8),
    }
    assert at_batch(first, second, 5)["windows"].nbytes == 245 * 8 * 4


events = st.lists(st.tuples(st.booleans(), st.integers(1, 3 << 20), st.integers(0, 10**6)), max_size=40)


@settings(max_examples=60)
@given(events)
def test_chunks_of_an_arena_never_overlap_and_regions_stay_whole(script):
    arena, taken = Arena(), []
    for free, nbytes, which in script:
        if free and taken:
            arena.free(taken.pop(which % len(taken))[0])
        else:
            taken.append((arena.allocate(nbytes), nbytes))
    for chunks, pages in zip(arena.regions, arena.written, strict=True):
        assert [chunk.start for chunk in chunks] == np.cumsum([0, *(chunk.size for chunk in chunks)])[:-1].tolist()
        assert sum(chunk.size for chunk in chunks) == 4096 * len(pages)
        assert not any(a.taken is b.taken is False for a, b in itertools.pairwise(chunks))
    assert all(chunk.taken and chunk.size >= nbytes for chunk, nbytes in taken)
    assert arena.resident_bytes >= sum(nbytes for _, nbytes in taken)


def test_a_block_fills_the_smallest_gap_that_fits():
    stacked = [("a", 640), ("b", 64), ("a", -1), ("c", 320), ("d", 320), ("b", -1), ("c", -1), ("d", -1)]
    assert pattern_bytes(stacked) == 704
    assert pattern_bytes([("a", 64), ("b", 64), ("a", -1), ("c", 128)]) == 64 + 64 + 128  # too large for the gap
    assert pattern_bytes([]) == 0


@pytest.mark.parametrize("active", [30, 600])
def test_weight_bytes_are_those_of_scipy(active):
    bits = np.zeros(40 * 27, bool)
    bits[np.random.default_rng(0).choice(bits.size, active, replace=False)] = True
    tensor = SparseTensor.from_dense(
        bits.reshape(40, 3, 3, 3).astype(np.float32), Mask.from_bool(bits.reshape(40, 3, 3, 3))
    )
    matrix = scipy.sparse.csr_array(bits.reshape(40, 27).astype(np.float32))
    expected = matrix.data.nbytes + matrix.indices.nbytes + matrix.indptr.nbytes if active == 30 else bits.size * 4
    assert csr_weight_bytes(tensor, max_density=0.2) == expected
