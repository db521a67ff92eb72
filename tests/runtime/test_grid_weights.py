"""Weights on a grid: kernels take the codes, and agree with the reference, which takes the values."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsr_tool.formats.archive import open_archive, write_archive
from dsr_tool.graph.ir import Graph, Node, Value
from dsr_tool.runtime.compiler.machine import Machine
from dsr_tool.runtime.compiler.plan import Plan
from dsr_tool.runtime.compiler.program import KernelStep
from dsr_tool.runtime.kernels.library import library
from dsr_tool.runtime.kernels.ops import LIMITS, Kind
from dsr_tool.runtime.session import Session, decode
from dsr_tool.sparsity.at_rest import arrays_of
from dsr_tool.sparsity.config import ModelConfig
from dsr_tool.sparsity.grid import GridTensor, largest_code
from dsr_tool.sparsity.layers import LayerSpec
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor

pytestmark = pytest.mark.skipif(library() is None, reason="no kernels were built here")

DENSITIES = st.sampled_from((0.0, 0.02, 0.1, 0.3, 0.6, 0.8, 1.0))
BITS = st.sampled_from((4, 5, 6, 8))
WITH_WEIGHTS = (Kind.SPMM, Kind.GEMV)
PADS = {"pads": (1, 1, 1, 1)}


def grid(rng: np.random.Generator, shape: tuple[int, ...], density: float, bits: int = 8) -> GridTensor:
    """Returns a weight with random active entries, codes of all sizes, zero among them, and a channel of scale zero."""
    mask, q = rng.random(shape) < density, largest_code(bits)
    scales = (rng.random(shape[0]) * 10.0 ** rng.uniform(-3, 1, shape[0]) / q).astype(np.float32)
    codes = rng.integers(-q, q + 1, int(mask.sum())).astype(np.int8)
    if shape[0] > 2:
        scales[1] = 0
        codes[np.nonzero(mask)[0] == 1] = 0
    return GridTensor(Mask.from_bool(mask), codes, scales)


def weights_taken(plan: Plan) -> list[bool]:
    """Returns for each op with weights whether its struct has codes; pointers and the pack's type must say the same."""
    steps = [step for step in plan.steps if isinstance(step, KernelStep)]
    packs = [pack for step in steps for pack in step.packs]
    structs = [
        op.spmm if op.kind == Kind.SPMM else op.gemv for step in steps for op in step.ops if op.kind in WITH_WEIGHTS
    ]
    taken = [bool(struct.codes) for struct in structs]
    assert taken == [pack.coded for pack in packs]
    assert taken == [bool(struct.scales) for struct in structs] == [not struct.values for struct in structs]
    return taken


@settings(max_examples=120, deadline=None)
@given(
    st.integers(0, 2**32), st.sampled_from(((1, 1), (2, 2), (3, 3), (6, 6))), DENSITIES, BITS, st.booleans(),
    st.sampled_from(((1, 1), (3, 3), (2, 2), (5, 5), (3, 1))), st.integers(1, 3), st.data(),
)  # fmt: skip
def test_convolutions_agree(machine, both, sparse, seed, groups, density, bits, with_bias, kernel, stride, data):
    rng = np.random.default_rng(seed)
    group, multiple = groups
    channels, rows = 6 * data.draw(st.integers(1, 3)), multiple * data.draw(st.integers(1, 4))
    rows = max(rows // group, 1) * group
    pads = data.draw(st.tuples(*[st.integers(0, 2)] * 4))
    size = data.draw(st.tuples(*(st.integers(max(k - pads[i] - pads[i + 2], 1), 29) for i, k in enumerate(kernel))))
    x = rng.standard_normal((data.draw(st.integers(1, 3)), channels, *size)).astype(np.float32)
    tensors = {"w": grid(rng, (rows, channels // group, *kernel), density, bits)}
    if with_bias:
        tensors["b"] = sparse(rng, (rows,), 1.0)
    attributes = {"group": group, "strides": (stride,) * 2, "pads": pads}
    plan = both(machine, [Node("Conv", ("x", *tensors), ("y",), attributes)], tensors, x)
    assert weights_taken(plan) == [True]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 900), st.integers(1, 90), DENSITIES, BITS)
def test_linear_layers_agree(machine, both, sparse, seed, batch, columns, rows, density, bits):
    rng = np.random.default_rng(seed)
    tensors = {"w": grid(rng, (rows, columns), density, bits), "b": sparse(rng, (rows,), 1.0)}
    x = rng.standard_normal((batch, columns)).astype(np.float32)
    nodes = [Node("Gemm", ("x", "w", "b"), ("z",), {"transB": 1}), Node("Relu", ("z",), ("y",))]
    assert weights_taken(both(machine, nodes, tensors, x)) == [True]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), DENSITIES, DENSITIES, st.booleans(), st.integers(3, 20))
def test_residuals_and_activations_come_after_the_scale(machine, both, sparse, seed, first, second, relu, size):
    rng = np.random.default_rng(seed)
    tensors = {
        "a": grid(rng, (7, 40, 3, 3), first), "b": grid(rng, (7, 7, 1, 1), second), "c": sparse(rng, (7,), 1.0),
        "d": grid(rng, (7, 7, 3, 3), second),
    }  # fmt: skip
    nodes = [
        Node("Conv", ("x", "a", "c"), ("p",), PADS),
        Node("Conv", ("p", "b", "c"), ("q",)),
        Node("Conv", ("q", "d"), ("r",), PADS),
        Node("Add", ("r", "p"), ("s",)),
        Node("Relu" if relu else "HardSwish", ("s",), ("y",)),
    ]
    x = rng.standard_normal((2, 40, size, size)).astype(np.float32)
    plan = both(machine, nodes, tensors, x)
    assert weights_taken(plan) == [True] * 3
    # The addition is part of a convolution.
    assert [op.kind for op in plan.steps[0].ops].count(Kind.SPMM) == len(plan.steps[0].packs)


def test_a_transposed_matrix_keeps_its_codes_and_a_plain_one_becomes_floats(machine, both):
    """The scales of a plain matrix on the right belong to its rows, which are inputs of the product."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 4, 20)).astype(np.float32)
    tensors = {"w": grid(rng, (12, 20), 0.3)}
    nodes = [Node("Transpose", ("w",), ("t",), {"perm": (1, 0)}), Node("MatMul", ("x", "t"), ("y",))]
    assert weights_taken(both(machine, nodes, tensors, x)) == [True]
    tensors = {"w": grid(rng, (20, 12), 0.3)}
    assert weights_taken(both(machine, [Node("MatMul", ("x", "w"), ("y",))], tensors, x)) == [False]


def test_the_gates_of_squeeze_and_excitation_keep_their_codes(machine, both):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 8, 14, 13)).astype(np.float32)
    tensors = {"s": grid(rng, (4, 8, 1, 1), 0.3), "e": grid(rng, (8, 4, 1, 1), 0.9)}
    nodes = [
        Node("GlobalAveragePool", ("x",), ("p",)),
        Node("Conv", ("p", "s"), ("q",)),
        Node("Conv", ("q", "e"), ("t",)),
        Node("Mul", ("x", "t"), ("y",)),
    ]
    assert weights_taken(both(machine, nodes, tensors, x)) == [True] * 2


@pytest.mark.parametrize("scale", [np.inf, 3e37])
def test_scales_whose_codes_overflow_are_left_to_floats(machine, both, scale):
    rng = np.random.default_rng(0)
    weight = grid(rng, (5, 6, 1, 1), 0.5)
    weight.scales[3] = scale
    x = rng.standard_normal((1, 6, 4, 4)).astype(np.float32)
    with np.errstate(all="ignore"):
        assert weights_taken(both(machine, [Node("Conv", ("x", "w"), ("y",))], {"w": weight}, x)) == [False]


@pytest.mark.parametrize("density", [0.03, 0.2, 0.9])
@pytest.mark.parametrize("shape", [(1, 16, 31, 29), (1, 700, 7, 7), (1, 1, 1, 5000)])
def test_results_are_bit_identical_for_any_number_of_threads(shape, density):
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape).astype(np.float32)
    if shape[1] == 1:
        x, tensors = x.reshape(1, -1), {"w": grid(rng, (33, shape[-1]), density)}
        node = Node("Gemm", ("x", "w"), ("y",), {"transB": 1})
    else:
        tensors = {"w": grid(rng, (33, shape[1], 3, 3), density)}
        node = Node("Conv", ("x", "w"), ("y",), PADS)
    graph = Graph((Value("x", x.shape),), (Value("y", ()),), (node,), {}, ("w",), 20)
    plans = [Plan(graph, tensors, x.shape, Machine(library(), threads)) for threads in (1, 2, 5)]
    results = [plan.run(x)[0] for plan in plans]
    assert all(weights_taken(plan) == [True] for plan in plans)
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def product_of(plan: Plan) -> ctypes.Structure:
    """Returns the struct of the only product of a plan."""
    (product,) = (op.spmm for op in plan.steps[0].ops if op.kind == Kind.SPMM)
    return product


@pytest.mark.parametrize(
    ("channels", "size", "density", "converts", "same_bits"),
    [
        (8, 28, 0.05, True, True),  # a long plane, and few records of a channel
        (8, 28, 0.3, False, True),  # many records: values of codes in registers
        (700, 4, 0.3, False, True),
        (700, 4, 0.002, False, True),  # a short plane
        (8, 28, 0.8, True, True),  # with zeros
        (200, 4, 0.8, False, False),  # with zeros, and a short plane: sums of codes are scaled
    ],
)
def test_codes_become_values_before_tiles_or_in_registers(both, channels, size, density, converts, same_bits):
    """Values are those of the reference, so such a product has every bit of one with floats."""
    rng = np.random.default_rng(0)
    weight = grid(rng, (10, channels, 3, 3), density)
    x = rng.standard_normal((1, channels, size, size)).astype(np.float32)
    machine = Machine(library(), 1)
    plan = both(machine, [Node("Conv", ("x", "w"), ("y",), PADS)], {"w": weight}, x)
    assert weights_taken(plan) == [True]
    assert product_of(plan).convert == converts
    floats = both(machine, [Node("Conv", ("x", "w"), ("y",), PADS)], {"w": SparseTensor(weight.mask, weight.values)}, x)
    assert weights_taken(floats) == [False]
    assert np.array_equal(plan.run(x)[0], floats.run(x)[0]) == same_bits


@pytest.mark.parametrize(("most", "converts"), [(12, True), (60, False)])
def test_channels_may_have_any_number_of_records(both, most, converts):
    """A vector of codes may end anywhere in a channel; what follows belongs to the next one."""
    rng = np.random.default_rng(0)
    weight = grid(rng, (most, most, 1, 1), 1.0)
    mask = np.tril(np.ones((most, most), np.bool_))
    weight = GridTensor(Mask.from_bool(mask.reshape(most, most, 1, 1)), weight.codes[mask.ravel()], weight.scales)
    x = rng.standard_normal((1, most, 40, 40)).astype(np.float32)
    machine = Machine(library(), 1)
    plan = both(machine, [Node("Conv", ("x", "w"), ("y",))], {"w": weight}, x)
    assert product_of(plan).convert == converts
    assert set(plan.steps[0].packs[0].entries[:, 1]) >= set(range(1, 9))
    floats = both(machine, [Node("Conv", ("x", "w"), ("y",))], {"w": SparseTensor(weight.mask, weight.values)}, x)
    np.testing.assert_array_equal(plan.run(x)[0], floats.run(x)[0])


def test_a_session_of_an_archive_keeps_codes_through_the_norm_and_for_another_batch(tmp_path):
    rng = np.random.default_rng(0)
    norm = {name: rng.uniform(0.5, 1.5, 6).astype(np.float32) for name in ("s", "b", "m", "v")}
    full = Mask.full((6,))
    tensors = {"w": grid(rng, (6, 30, 3, 3), 0.1), **{name: SparseTensor(full, norm[name]) for name in norm}}
    nodes = (
        Node("Conv", ("x", "w"), ("c",), PADS),
        Node("BatchNormalization", ("c", *norm), ("n",)),
        Node("GlobalAveragePool", ("n",), ("p",)),
        Node("Flatten", ("p",), ("y",)),
    )
    graph = Graph((Value("x", (None, 30, 8, 8)),), (Value("y", (None, 6)),), nodes, {}, tuple(tensors), 20)
    specs = {name: LayerSpec(name, t.mask.shape, "Conv2d", "sparse", True, "") for name, t in tensors.items()}
    write_archive(tmp_path / "net.dsr", tensors, specs, graph, ModelConfig("module", "Net", 6, (30, 8, 8)))
    session, reference = (Session(tmp_path / "net.dsr", runtime=name) for name in ("native", "scipy"))
    for batch in (1, 3):
        x = rng.standard_normal((batch, 30, 8, 8)).astype(np.float32)
        np.testing.assert_allclose(session.run(x), reference.run(x), rtol=1e-5, atol=1e-5)
        assert weights_taken(session._plan._latest()) == [True]
    _, kept = decode(open_archive(tmp_path / "net.dsr"))
    # A byte for each weight and a bit for each entry, instead of 4 bytes and 8.
    assert sum(array.nbytes for array in arrays_of(kept["w"])) <= tensors["w"].mask.active + 6 * 30 * 9 / 8 + 1 + 24


def test_records_of_codes_take_3_bytes_and_of_floats_6():
    rng = np.random.default_rng(0)
    weight = grid(rng, (64, 64, 3, 3), 0.1)
    x = np.zeros((1, 64, 8, 8), np.float32)
    graph = Graph((Value("x", x.shape),), (Value("y", ()),), (Node("Conv", ("x", "w"), ("y",), PADS),), {}, ("w",), 20)
    machine = Machine(library(), 1)
    taken = []
    for tensor in (weight, SparseTensor(weight.mask, weight.values)):
        machine.packer.clear()
        (pack,) = Plan(graph, {"w": tensor}, x.shape, machine).steps[0].packs
        taken.append(pack.values.nbytes + pack.offsets.nbytes)
    # Two spare offsets, and spare codes, which kernels may read.
    assert taken == [3 * weight.mask.active + LIMITS["SPARE_CODES"] + 4, 6 * weight.mask.active + 4]
