"""The reference computes convolutions like ONNX Runtime, at any density and in blocks of rows."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsr_tool.errors import UsageError
from dsr_tool.runtime.reference import convolution
from dsr_tool.runtime.reference.convolution import prepare_conv
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor

DENSITIES = st.sampled_from((0.0, 0.02, 0.1, 0.3, 1.0))


def random_sparse(rng: np.random.Generator, shape: tuple[int, ...], density: float) -> np.ndarray:
    return np.where(rng.random(shape) < density, rng.standard_normal(shape), 0).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(1, 3),
    st.sampled_from(((1, 6), (2, 6), (3, 6), (6, 6), (6, 12))),
    DENSITIES,
    st.booleans(),
    st.data(),
)
def test_conv_agrees_with_onnxruntime(agree, seed, rank, groups, density, with_bias, data):
    rng = np.random.default_rng(seed)
    group, out = groups
    sizes = st.tuples(*[st.integers(1, 3)] * rank)
    kernel, strides, dilations = (data.draw(sizes) for _ in range(3))
    pads = data.draw(st.tuples(*[st.integers(0, 2)] * (2 * rank)))
    size = data.draw(st.tuples(*[st.integers(7, 9 if rank < 3 else 7)] * rank))
    x = rng.standard_normal((data.draw(st.integers(1, 3)), 6, *size)).astype(np.float32)
    weight = random_sparse(rng, (out, 6 // group, *kernel), density)
    bias = rng.standard_normal(out).astype(np.float32) if with_bias else None
    inputs = (x, weight) if bias is None else (x, weight, bias)
    agree("Conv", *inputs, group=group, strides=strides, dilations=dilations, pads=pads)


def test_conv_in_three_dimensions_with_default_attributes_agrees(agree):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 4, 5, 6, 7)).astype(np.float32)
    agree("Conv", x, random_sparse(rng, (3, 4, 2, 3, 1), 0.1), kernel_shape=(2, 3, 1), auto_pad="VALID")


@pytest.mark.parametrize("density", [0.05, 0.9])
def test_conv_in_blocks_of_rows_agrees(agree, monkeypatch, density):
    monkeypatch.setattr(convolution, "COLUMN_BYTES", 1 << 12)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, 8, 23, 21)).astype(np.float32)
    agree("Conv", x, random_sparse(rng, (5, 8, 3, 3), density), pads=(1, 1, 1, 1), strides=(2, 1), dilations=(1, 2))


def test_active_weights_of_zero_are_kept():
    weight = SparseTensor(Mask((2, 3, 1, 1), np.array([1, 4])), np.array([0.0, 2.0], np.float32))
    x = np.arange(6, dtype=np.float32).reshape(1, 3, 2, 1)
    result = prepare_conv(weight)(x)
    np.testing.assert_array_equal(result, [[[[0], [0]], [[4], [6]]]])


def test_memory_stays_below_a_quarter_of_all_columns():
    rng = np.random.default_rng(2)
    kernel = prepare_conv(random_sparse(rng, (4, 32, 3, 3), 0.1), pads=(1, 1, 1, 1))
    x = rng.standard_normal((1, 32, 256, 256)).astype(np.float32)
    tracemalloc.start()
    result = kernel(x)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    columns = 9 * x.nbytes
    assert peak < columns / 4
    assert peak < 1.1 * x.nbytes + 2 * result.nbytes + (12 << 20)


def test_automatic_padding_is_refused():
    with pytest.raises(UsageError, match="SAME_UPPER"):
        prepare_conv(np.ones((1, 1, 3, 3), np.float32), auto_pad="SAME_UPPER")
