"""Pools of blocked tensors are torch's pools of the images, forward and backward."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional

from dsr_tool.runtime.kernels.library import library
from dsr_tool.runtime.kernels.training import CALLS
from dsr_tool.sparse.blocked.layout import block, unblock
from dsr_tool.sparse.blocked.pooling import adaptive_avg_pool, avg_pool, global_mean, max_pool

pytestmark = pytest.mark.skipif(library() is None, reason="no kernels were built here")

LANES = (4, 8, 16)
PLANES = ((7, 9), (12, 8), (5, 5))


def images(height, width, *, ties=False):
    x = torch.randn(18, 3, height, width, generator=torch.Generator().manual_seed(height))
    return x.round(decimals=1) if ties else x


def both(x, lanes, theirs, ours, kernel, *options):
    """Returns result and gradient of x by torch in float64 and float32, and by the kernel, which must have run."""
    rows = []
    for name, dtype in (("torch", torch.float64), ("torch", torch.float32), ("ours", torch.float32)):
        leaf = x.to(dtype, copy=True).requires_grad_()
        before = CALLS.copy()
        y = theirs(leaf, *options) if name == "torch" else unblock(ours(block(leaf, lanes), *options), x.shape[0])
        gradient = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        y.backward(gradient.to(dtype))
        rows.append((y.detach(), leaf.grad))
        for direction in ("forward", "backward"):
            name_of_kernel = f"dsr_{kernel}_pool_{direction}"
            assert CALLS[name_of_kernel] == before[name_of_kernel] + (name == "ours")
    return rows


def assert_as_near(exact, torch32, ours):
    for e, b, a in zip(exact, torch32, ours, strict=True):
        assert a.shape == e.shape
        assert (a - e).abs().max() <= 2 * (b - e).abs().max() + 3e-7 * e.abs().max()


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("plane", PLANES)
def test_max_pools_take_what_torch_takes(lanes, plane):
    """Equal entries too: the first one gets the gradient."""
    x = images(*plane, ties=True)
    sizes = ((1, 2, 3, (3, 2), 4), (None, 1, 2, (2, 3)), (0, 1), (1, 2), (False, True))
    for kernel, stride, padding, dilation, ceil in itertools.product(*sizes):
        # Torch refuses padding over half of the kernel, and a kernel that reaches past the input.
        if (padding and kernel == 1) or (kernel == 4 and dilation == 2 and min(plane) < 7):
            continue
        options = (kernel, stride, padding, dilation, ceil)
        _, torch32, mine = both(x, lanes, functional.max_pool2d, max_pool, "max", *options)
        assert torch.equal(mine[0], torch32[0]), options
        torch.testing.assert_close(mine[1], torch32[1], rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("kernel", [2, 3, 5])
def test_nan_wins_a_window_and_minus_infinity_loses(lanes, kernel):
    x = images(12, 8, ties=True)
    x[0, 0, 1, 1] = x[0, 0, 1, 2] = x[5, 1, 3, 3] = float("nan")
    x[3, 1], x[4, 2, 2, 2] = -float("inf"), float("inf")
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    results = [
        functional.max_pool2d(leaves[0], kernel, 2, 1),
        unblock(max_pool(block(leaves[1], lanes), kernel, 2, 1), 18),
    ]
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0, equal_nan=True)
    for y in results:
        y.backward(torch.ones_like(y))
    assert torch.equal(leaves[1].grad, leaves[0].grad)


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("plane", PLANES)
def test_average_pools_divide_as_torch_does(lanes, plane):
    sizes = ((1, 2, 3, (3, 2)), (None, 1, 2, (2, 3)), (0, 1), (False, True), (False, True))
    for kernel, stride, padding, ceil, count in itertools.product(*sizes):
        if padding and kernel == 1:
            continue
        options = (kernel, stride, padding, ceil, count)
        assert_as_near(*both(images(*plane), lanes, functional.avg_pool2d, avg_pool, "mean", *options))


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("size", [1, 2, 3, (4, 2), 7, (None, 3), 20])
def test_adaptive_pools_cut_as_torch_does(lanes, size):
    for plane in PLANES:
        assert_as_near(*both(images(*plane), lanes, functional.adaptive_avg_pool2d, adaptive_avg_pool, "mean", size))


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("plane", [(1, 1), (7, 7), (61, 53)])
def test_the_global_mean_is_that_of_all_pixels(lanes, plane):
    x = images(*plane) + 100
    rows = both(x, lanes, lambda v: v.mean((2, 3), keepdim=True), global_mean, "mean")
    assert_as_near(*rows)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_do_not_change_a_bit(threads):
    x = torch.randn(3, 40, 13, 11, 16, requires_grad=True)
    for pool in (lambda v: max_pool(v, 3, 2, 1), lambda v: avg_pool(v, 3, 1, 1), global_mean):
        results = []
        for count in (1, threads):
            torch.set_num_threads(count)
            try:
                y = pool(x)
                results.append((y, *torch.autograd.grad(y, x, y.detach())))
            finally:
                torch.set_num_threads(1)
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_max_pool_keeps_one_byte_per_output():
    x, sizes = torch.randn(2, 3, 8, 8, 4, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: sizes.append(v.nbytes) or v, lambda v: v):
        y = max_pool(x, 2)
    assert sizes == [y.numel()]


def test_other_strides_are_copied_first():
    x = torch.randn(2, 6, 8, 8, 4)
    assert torch.equal(max_pool(x[:, 1:4], 2), max_pool(x, 2)[:, 1:4])
    assert torch.equal(avg_pool(x[:, 1:4], 2), avg_pool(x, 2)[:, 1:4])


def test_what_does_not_fit_is_refused():
    x = torch.zeros(1, 2, 6, 6, 4)
    with pytest.raises(ValueError, match=r"kernel \(17, 17\) has more than 256 entries"):
        max_pool(x, 17)
    with pytest.raises(ValueError, match="padding 2 is more than half of a kernel that reaches over 3 inputs"):
        max_pool(x, 3, padding=2)
    with pytest.raises(ValueError, match="a kernel that reaches over 8 inputs does not fit in 6 with padding 0"):
        avg_pool(x, 8)
    with pytest.raises(ValueError, match="expected a float32 CPU tensor"):
        global_mean(x[0])
