"""The reference computes matrix products like ONNX Runtime, and sparse ones like scipy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from dsr_tool.runtime.reference.matrices import MAX_CSR_DENSITY, multiplier
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor

DENSITIES = st.sampled_from((0.0, 0.03, 0.15, 0.5, 1.0))
SIZES = st.integers(1, 9)


def random_sparse(seed: int, shape: tuple[int, ...], density: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.where(rng.random(shape) < density, rng.standard_normal(shape), 0).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.lists(SIZES, max_size=3), SIZES, SIZES, DENSITIES)
def test_matmul_with_a_matrix_agrees(agree, seed, lead, columns, rows, density):
    x = random_sparse(seed, (*lead, columns), 1.0)
    agree("MatMul", x, random_sparse(seed + 1, (columns, rows), density))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), SIZES, SIZES, SIZES)
def test_batched_matmul_agrees(agree, seed, rows, inner, columns):
    a = random_sparse(seed, (2, 3, rows, inner), 1.0)
    agree("MatMul", a, random_sparse(seed + 1, (3, inner, columns), 1.0))
    # Neither of the last two axes is contiguous.
    agree("MatMul", a[::2, :, ::2, ::2], random_sparse(seed + 1, (1, 3, -(-inner // 2), columns), 1.0))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32), SIZES, SIZES, SIZES, DENSITIES, st.booleans(), st.booleans(),
    st.sampled_from(((1.0, 1.0), (0.5, 2.0))), st.sampled_from((None, "row", "full", "scalar")),
)  # fmt: skip
def test_gemm_agrees(agree, seed, batch, columns, rows, density, trans_a, trans_b, factors, bias):
    x = random_sparse(seed, (columns, batch) if trans_a else (batch, columns), 1.0)
    weight = random_sparse(seed + 1, (rows, columns) if trans_b else (columns, rows), density)
    shapes = {"row": (rows,), "full": (batch, rows), "scalar": (1,)}
    c = [] if bias is None else [random_sparse(seed + 2, shapes[bias], 1.0)]
    alpha, beta = factors
    agree("Gemm", x, weight, *c, alpha=alpha, beta=beta, transA=int(trans_a), transB=int(trans_b))


@pytest.mark.parametrize("equation", ["bhij,bhjd->bhid", "abcd,abed->abce", "abcd,abcd->ab"])
def test_einsum_agrees(agree, equation):
    a = random_sparse(0, (2, 3, 4, 4), 1.0)
    agree("Einsum", a, random_sparse(1, (2, 3, 4, 4), 1.0), equation=equation)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 4), SIZES, SIZES, SIZES, DENSITIES)
def test_grouped_products_equal_a_block_diagonal_product(seed, groups, rows, columns, n, density):
    weight = random_sparse(seed, (groups * rows, columns), density)
    x = random_sparse(seed + 1, (groups * columns, n), 1.0)
    expected = scipy.sparse.block_diag(np.split(weight, groups)).toarray() @ x
    for form in (weight, SparseTensor.from_dense(weight, Mask.from_bool(weight != 0))):
        np.testing.assert_allclose(multiplier(form, groups)(x), expected, rtol=1e-5, atol=1e-5)


def test_csr_and_dense_products_agree_around_the_threshold():
    x = random_sparse(0, (50, 7), 1.0)
    for density in (0.9 * MAX_CSR_DENSITY, 1.1 * MAX_CSR_DENSITY):
        weight = np.zeros(2000, np.float32)
        weight[: int(2000 * density)] = 1.5
        np.testing.assert_allclose(
            multiplier(weight.reshape(40, 50))(x), weight.reshape(40, 50) @ x, rtol=1e-5, atol=1e-5
        )
