"""Branches of kernels that ordinary networks reach seldom: values with several phases, NaN, ends of rows."""

from __future__ import annotations

import numpy as np
import pytest

from dsr_tool.graph.ir import Node
from dsr_tool.runtime.compiler.program import KernelStep
from dsr_tool.runtime.kernels.library import library
from dsr_tool.runtime.kernels.ops import Kind

pytestmark = pytest.mark.skipif(library() is None, reason="no kernels were built here")


def ops_of(plan, kind):
    return [op for step in plan.steps if isinstance(step, KernelStep) for op in step.ops if op.kind == kind]


def test_a_gate_on_pixels_of_several_phases(machine, both, sparse):
    """A mean, a factor per channel and a sum on a value that later strides keep at factor 2."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 4, 105, 103)).astype(np.float32)
    tensors = {"w": sparse(rng, (4, 4, 3, 3), 0.5), "v": sparse(rng, (3, 4, 3, 3), 0.5)}
    pads = {"pads": (1, 1, 1, 1)}
    nodes = [
        Node("Conv", ("x", "w"), ("a",), pads),
        Node("GlobalAveragePool", ("a",), ("m",)),
        Node("Mul", ("a", "m"), ("b",)),
        Node("Sub", ("b", "a"), ("c",)),
        Node("Conv", ("c", "v"), ("y",), {**pads, "strides": (2, 2)}),
    ]
    plan = both(machine, nodes, tensors, x)
    (mean,), (scale,), (combine,) = (ops_of(plan, kind) for kind in (Kind.MEAN, Kind.SCALE, Kind.COMBINE))
    assert (mean.mean.source_phases, scale.phases, combine.phases) == (4, 4, 4)


def test_max_pool_hands_on_nan(machine, both):
    x = np.random.default_rng(0).standard_normal((1, 3, 12, 14)).astype(np.float32)
    # At each place of a window, before and after larger entries.
    x[0, 0, 0, 0] = x[0, 1, 3, 5] = x[0, 2, 6, 1] = x[0, 2, 9, 2] = np.nan
    nodes = [Node("MaxPool", ("x",), ("y",), {"kernel_shape": (2, 2), "strides": (2, 2)})]
    assert ops_of(both(machine, nodes, {}, x), Kind.MAX_POOL)


@pytest.mark.parametrize("columns", [1, 3, 15, 16, 17, 40, 41])
def test_rows_of_any_length_are_normalised(machine, both, sparse, columns):
    """Softmax and layer normalisation of rows that do not fill a vector, with a spread of nearly zero."""
    rng = np.random.default_rng(columns)
    x = (rng.standard_normal((1, 5, columns)) * np.float32(1e-3)).astype(np.float32)
    scale = {"s": sparse(rng, (columns,), 1.0), "b": sparse(rng, (columns,), 1.0)}
    both(machine, [Node("LayerNormalization", ("x", "s", "b"), ("y",))], scale, x)
    both(machine, [Node("Softmax", ("x",), ("y",))], {}, x * 1e4)


def test_a_linear_layer_on_one_row_starts_from_a_residual(machine, both, sparse):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 40)).astype(np.float32)
    tensors = {"w": sparse(rng, (7, 40), 0.3), "v": sparse(rng, (7, 40), 0.8)}
    nodes = [
        Node("Gemm", ("x", "w"), ("a",), {"transB": 1}),
        Node("Gemm", ("x", "v"), ("b",), {"transB": 1}),
        Node("Add", ("a", "b"), ("y",)),
    ]
    ops = ops_of(both(machine, nodes, tensors, x), Kind.GEMV)
    assert sum(op.other_buffer >= 0 for op in ops) == 1


@pytest.mark.parametrize("entries", [5, 100, 40_000])
def test_long_arrays_are_copied_whole(machine, both, entries):
    """Relu on an array of the caller copies it first; more than one share from 16,384 floats on."""
    x = np.random.default_rng(0).standard_normal((1, entries)).astype(np.float32)
    assert ops_of(both(machine, [Node("Relu", ("x",), ("y",))], {}, x), Kind.COPY)
