"""Relayout by whole vectors and pixel by pixel writes the same bits to the same places."""

from __future__ import annotations

import ctypes
from unittest import mock

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsr_tool.runtime.compiler import relayout
from dsr_tool.runtime.compiler.layouts import Flat, Grid, Planes
from dsr_tool.runtime.compiler.machine import Machine
from dsr_tool.runtime.compiler.op import Op
from dsr_tool.runtime.compiler.program import KernelStep
from dsr_tool.runtime.compiler.relayout import to_planes
from dsr_tool.runtime.compiler.segment import Segment
from dsr_tool.runtime.kernels.library import library
from dsr_tool.runtime.kernels.ops import Kind

pytestmark = pytest.mark.skipif(library() is None, reason="no kernels were built here")


def memory_of(machine: Machine, ops: list[Op], x: np.ndarray) -> np.ndarray:
    """Runs ops and returns the memory of the last result, with the halo around its planes."""
    segment = Segment(machine.lanes, 1, list(ops), {"x": ops[0].source})
    step = KernelStep(machine, segment, 1e9)
    address = machine.arena(0)
    out, offset = ops[-1].out, step.ops[len(ops) - 1].out_offset
    everything = np.ctypeslib.as_array((ctypes.c_float * (offset + out.size)).from_address(address))
    everything[:] = np.nan
    step.run({"x": x})
    return everything[offset - out.lead :][: out.size].copy()


def planes(shape: tuple[int, ...], factor: int, extra: int, lanes: int) -> Planes:
    _, _, height, width = shape
    result = Planes(shape, Grid(-(-height // factor), -(-width // factor), 1 + extra, lanes), factor)
    assert result.extend_halo(result.grid.pitch + 1, result.grid.pitch + 1)
    return result


@settings(max_examples=200, deadline=None)
@example(0, 3, 14, 14, 1, 1, False)  # 14 vectors: less than a whole square
@example(0, 2, 7, 40, 1, 1, False)
@example(0, 2, 56, 56, 2, 0, False)
@given(
    st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 70), st.integers(1, 70), st.sampled_from((1, 2, 4)),
    st.integers(0, 3), st.booleans(),
)  # fmt: skip
def test_relayout_by_vectors_equals_relayout_by_pixels(machine, seed, channels, height, width, factor, extra, rows):
    shape = (1, channels, height, width)
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    memories = []
    for most in (relayout._MAX_POSITIONS, 0):
        with mock.patch.object(relayout, "_MAX_POSITIONS", most):
            flat = Flat((1, x.size), machine.lanes, 1)  # its own shape does not count
            first, out = planes(shape, 1, 0, machine.lanes), planes(shape, factor, extra, machine.lanes)
            ops = [to_planes(flat, out)] if rows else [to_planes(flat, first), to_planes(first, out)]
        assert most or all(op.kind is Kind.GATHER for op in ops)
        memories.append(memory_of(machine, ops, x))
    np.testing.assert_array_equal(*memories)


def test_large_planes_use_the_vector_kernel(machine):
    flat = Flat((1, 1, 56, 56), machine.lanes, 1)
    assert to_planes(flat, planes(flat.shape, 2, 0, machine.lanes)).kind is Kind.RELAYOUT


@pytest.mark.parametrize(("size", "factor"), [(4, 1), (300, 1), (64, 8)])
def test_other_planes_use_the_pixel_kernel(machine, size, factor):
    flat = Flat((1, 1, size, size), machine.lanes, 1)
    op = to_planes(flat, planes(flat.shape, factor, 0, machine.lanes))
    assert op.kind is (Kind.RELAYOUT if (size, machine.lanes) == (4, 4) else Kind.GATHER)
