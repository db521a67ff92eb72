"""Batch norm with residual and activation is at least as near to float64 as torch's float32 is."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional

from dsr_tool.runtime.kernels.library import library
from dsr_tool.runtime.kernels.train_planes import ACTIVATIONS
from dsr_tool.runtime.kernels.training import CALLS
from dsr_tool.sparse.blocked.layout import block, unblock
from dsr_tool.sparse.blocked.norm import act, add_act, norm_act

pytestmark = pytest.mark.skipif(library() is None, reason="no kernels were built here")

TORCH = {
    "none": lambda x: x,
    "relu": functional.relu,
    "relu6": functional.relu6,
    "leaky_relu": functional.leaky_relu,
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
    "hardsigmoid": functional.hardsigmoid,
    "hardswish": functional.hardswish,
}
# Images that fill their lanes and that do not; planes of one pixel, of odd sides, and longer than a chunk.
SHAPES = ((21, 5, 7, 7), (16, 3, 4, 5), (33, 6, 1, 1), (3, 2, 1, 5), (7, 2, 19, 23))
EPS = 1e-5


def inputs(shape, seed=0):
    """Returns x, residual, gradient of the result, weight, bias, and running mean and variance."""
    make = torch.Generator().manual_seed(seed)
    x, residual, gradient = (torch.randn(shape, generator=make) for _ in range(3))
    weight, bias, mean = (torch.randn(shape[1], generator=make) for _ in range(3))
    return x * 3 + 5, residual, gradient, weight, bias, mean, torch.rand(shape[1], generator=make) + 0.5


def by_torch(values, dtype, activation, *, training=True, add=True, affine=True, momentum=0.1):
    """Returns the result, the gradients of x, residual, weight and bias, and the running statistics after it."""
    x, residual, gradient, weight, bias, mean, variance = (v.to(dtype, copy=True) for v in values)
    leaves = [v.requires_grad_() for v in (x, residual, weight, bias)]
    parameters = (weight, bias) if affine else (None, None)
    z = functional.batch_norm(x, mean, variance, *parameters, training, momentum, EPS)
    y = TORCH[activation](z + residual if add else z)
    y.backward(gradient)
    return [y.detach(), *(v.grad for v in leaves), mean, variance]


def by_kernels(values, lanes, activation, *, training=True, add=True, affine=True, momentum=0.1):
    """Returns the same."""
    x, residual, gradient, weight, bias, mean, variance = (v.clone() for v in values)
    leaves = [v.requires_grad_() for v in (x, residual, weight, bias)]
    before = CALLS.copy()
    y = norm_act(
        block(x, lanes),
        *((weight, bias) if affine else (None, None)),
        mean,
        variance,
        training=training,
        momentum=momentum,
        eps=EPS,
        images=x.shape[0],
        residual=block(residual, lanes) if add else None,
        activation=activation,
    )
    y = unblock(y, x.shape[0])
    y.backward(gradient)
    for name in ("dsr_norm_forward", "dsr_norm_backward"):
        assert CALLS[name] == before[name] + 1
    return [y.detach(), *(v.grad for v in leaves), mean, variance]


def assert_as_near(ours, torch32, exact):
    """Asserts that every result is as near to float64 as torch's, up to a factor of 2 and some roundings."""
    names = ("y", "gradient of x", "of residual", "of weight", "of bias", "running mean", "running variance")
    for name, a, b, e in zip(names, ours, torch32, exact, strict=True):
        if e is None:
            assert a is None
            continue
        allowed = 2 * (b - e).abs().max() + 1e-6 * e.abs().max()
        assert (a - e).abs().max() <= allowed, name


@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_results_and_gradients_are_as_near_to_float64_as_torch(lanes, activation, add, training):
    for seed, (shape, affine) in enumerate(itertools.product(SHAPES, (True, False))):
        values, options = inputs(shape, seed), {"training": training, "add": add, "affine": affine}
        exact, torch32 = (by_torch(values, dtype, activation, **options) for dtype in (torch.float64, torch.float32))
        assert_as_near(by_kernels(values, lanes, activation, **options), torch32, exact)


@pytest.mark.parametrize("lanes", [8, 16])
@pytest.mark.parametrize("mean", [1e3, 1e5])
def test_a_small_deviation_under_a_large_mean_keeps_its_digits(lanes, mean):
    values = list(inputs((18, 4, 9, 9)))
    values[0] = values[0] / 8 + mean
    exact, torch32 = (by_torch(values, dtype, "relu") for dtype in (torch.float64, torch.float32))
    ours = by_kernels(values, lanes, "relu")
    # Torch subtracts mean * scale from x * scale, so it loses the digits of the mean; the kernels subtract the mean.
    assert (torch32[0] - exact[0]).abs().max() > 20 * (ours[0] - exact[0]).abs().max()
    for a, e in zip(ours[:1] + ours[2:], exact[:1] + exact[2:], strict=True):
        assert (a - e).abs().max() <= 3e-6 * e.abs().max()


def test_first_images_far_from_the_others_cost_no_digits():
    values = inputs((64, 3, 8, 8))
    values[0][:4] += 1e4
    exact, ours = by_torch(values, torch.float64, "none"), by_kernels(values, 4, "none")
    for a, e in zip((ours[0], *ours[3:]), (exact[0], *exact[3:]), strict=True):
        assert (a - e).abs().max() <= 2e-6 * e.abs().max()


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
@pytest.mark.parametrize("training", [True, False])
def test_padding_is_not_seen_and_gets_no_gradient(add, activation, training):
    x, residual, gradient, weight, bias, mean, variance = inputs((19, 3, 5, 3))
    results = []
    for garbage in (0.0, 1e20):
        tensors = [block(v, 8) for v in (x, residual, gradient)]
        for v in tensors:
            v[-1, ..., 3:] = garbage
        tensors[2][-1, ..., 3:] = min(garbage, 5.0)
        leaves = [v.clone().requires_grad_() for v in (tensors[0], tensors[1], weight, bias)]
        y = norm_act(
            leaves[0],
            leaves[2],
            leaves[3],
            mean,
            variance,
            training=training,
            momentum=0.0,
            eps=EPS,
            images=19,
            residual=leaves[1] if add else None,
            activation=activation,
        )
        gradients = torch.autograd.grad(y, leaves if add else [leaves[0], *leaves[2:]], tensors[2])
        blocked = gradients[:2] if add else gradients[:1]
        assert all((g[-1, ..., 3:] == 0).all() for g in blocked)
        results.append([unblock(y, 19), *gradients])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("activation", ["none", "relu", "hardswish"])
def test_threads_do_not_change_a_bit(activation):
    values, results = inputs((70, 24, 12, 12)), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            results.append(by_kernels(values, 16, activation))
        finally:
            torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_running_statistics_follow_torch_over_steps():
    """As an exponential average, and as a cumulative one, for which the caller counts."""
    for momentum in (0.1, 1.0, None):
        norm = torch.nn.BatchNorm2d(4, momentum=momentum)
        mean, variance = norm.running_mean.clone(), norm.running_var.clone()
        for step in range(1, 5):
            x = torch.randn(10, 4, 3, 3) * step + step
            norm(x)
            share = 1 / step if momentum is None else momentum
            options = {"training": True, "momentum": share, "eps": norm.eps, "images": 10}
            version = mean._version
            norm_act(block(x, 4), None, None, mean, variance, **options)
            assert mean._version > version
            torch.testing.assert_close(mean, norm.running_mean, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(variance, norm.running_var, rtol=1e-6, atol=1e-6)


def test_without_running_statistics_those_of_the_batch_count():
    values = inputs((9, 3, 4, 4))
    x, options = block(values[0], 4), {"momentum": None, "eps": EPS, "images": 9}
    y = norm_act(x, None, None, None, None, training=False, **options)
    expected = functional.batch_norm(values[0], None, None, training=True)
    torch.testing.assert_close(unblock(y, 9), expected)


def test_only_what_needs_a_gradient_gets_one():
    x, residual, gradient, weight, bias, mean, variance = inputs((9, 3, 4, 4))
    tensors = {"x": block(x, 4), "residual": block(residual, 4), "weight": weight, "bias": bias}
    options = {"training": True, "momentum": 0.0, "eps": EPS, "images": 9, "activation": "relu"}

    def gradients(*wanted):
        now = {name: v.clone().requires_grad_(name in wanted) for name, v in tensors.items()}
        y = norm_act(now["x"], now["weight"], now["bias"], mean, variance, residual=now["residual"], **options)
        y.backward(block(gradient, 4))
        return {name: v.grad for name, v in now.items()}

    every = gradients(*tensors)
    for name in tensors:
        alone = gradients(name)
        assert torch.equal(alone.pop(name), every[name])
        assert set(alone.values()) == {None}


@pytest.mark.parametrize(("add", "kept"), [(False, 1), (True, 2)])
def test_no_more_is_kept_than_torch_keeps(add, kept):
    """The input, and with a residual the result, which the next convolution keeps as well."""
    x, residual, _, weight, bias, mean, variance = inputs((16, 4, 20, 20))
    blocked, other = block(x, 16).requires_grad_(), block(residual, 16)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: sizes.append(v.nbytes) or v, lambda v: v):
        norm_act(
            blocked,
            weight,
            bias,
            mean,
            variance,
            training=True,
            momentum=0.1,
            eps=EPS,
            images=16,
            residual=other if add else None,
            activation="relu",
        )
    assert kept * blocked.nbytes <= sum(sizes) <= kept * blocked.nbytes + 100 * 4


@pytest.mark.parametrize("activation", ["relu", "relu6", "none", "leaky_relu", "silu", "hardswish"])
def test_nan_spreads_over_its_channel_and_stays(activation):
    values = inputs((9, 3, 4, 4))
    values[0][2, 1, 3, 3] = float("nan")
    y = by_kernels(values, 4, activation, add=False)[0]
    assert y[:, 1].isnan().all()
    assert y[:, [0, 2]].isfinite().all()
    assert act(torch.tensor([float("nan"), 1.0]), activation).isnan().tolist() == [True, False]


def test_infinite_values_pass_as_in_torch():
    x = torch.tensor([float("inf"), -float("inf"), 6.0, 0.0, -0.0, 3.0, -3.0])
    for name in ("none", "relu", "relu6", "leaky_relu", "hardsigmoid"):
        ours, theirs = (x.clone().requires_grad_() for _ in range(2))
        y, z = act(ours, name), TORCH[name](theirs)
        assert torch.equal(y, z)
        for result in (y, z):
            result.backward(torch.ones_like(x))
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("count", [1, 15, 64, 70_001])
@pytest.mark.parametrize("add", [False, True])
def test_sums_and_activations_are_as_near_to_float64_as_torch(activation, count, add):
    make = torch.Generator().manual_seed(count)
    a, b, gradient = (torch.randn(count, generator=make) * 3 for _ in range(3))

    def run(function, dtype):
        x, y = (v.to(dtype, copy=True).requires_grad_() for v in (a, b))
        z = function(x, y)
        z.backward(gradient.to(dtype))
        return [z.detach(), x.grad, *([y.grad] if add else [])]

    def theirs(x, y):
        return TORCH[activation](x + y if add else x)

    def ours(x, y):
        return add_act(x, y, activation) if add else act(x, activation)

    exact, torch32 = run(theirs, torch.float64), run(theirs, torch.float32)
    before = CALLS["dsr_act_backward"]
    for mine, other, e in zip(run(ours, torch.float32), torch32, exact, strict=True):
        assert (mine - e).abs().max() <= 2 * (other - e).abs().max() + 3e-7 * e.abs().max()
    assert CALLS["dsr_act_backward"] == before + (activation != "none")


def test_leaky_relu_takes_a_slope():
    x = torch.tensor([-2.0, 3.0], requires_grad=True)
    y = act(x, "leaky_relu", 0.25)
    y.sum().backward()
    assert (y.tolist(), x.grad.tolist()) == ([-0.5, 3.0], [0.25, 1.0])


def test_second_derivatives_are_refused():
    x = torch.randn(4, 2, 3, 3, requires_grad=True)
    options = {"training": True, "momentum": None, "eps": EPS, "images": 4}
    y = norm_act(block(x, 4), None, None, None, None, **options)
    (gradient,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_what_does_not_fit_is_refused():
    x, one = torch.zeros(1, 3, 2, 2, 4), torch.ones(3)

    def run(x=x, weight=None, mean=None, training=True, momentum=0.1, images=4, **options):
        norm_act(x, weight, None, mean, mean, training=training, momentum=momentum, eps=EPS, images=images, **options)

    with pytest.raises(ValueError, match="more than one value per channel in training, but got 1 image of 1 x 1"):
        run(x[:, :, :1, :1], images=1)
    with pytest.raises(ValueError, match="5 images do not fill 1 blocks of 4 lanes"):
        run(images=5)
    with pytest.raises(ValueError, match="activation 'tanh' is unknown"):
        run(activation="tanh")
    with pytest.raises(ValueError, match="slope -1 is negative"):
        run(activation="leaky_relu", slope=-1)
    with pytest.raises(ValueError, match="momentum None has no count of batches"):
        run(mean=one, momentum=None)
    with pytest.raises(ValueError, match=r"float32 of shape \(3,\), but one is \(2,\)"):
        run(weight=torch.ones(2))
    with pytest.raises(ValueError, match="residual has shape"):
        run(residual=x[:, :2])
    with pytest.raises(ValueError, match="needs one shape"):
        add_act(x, x[:, :2], "relu")
    with pytest.raises(ValueError, match="expected a float32 CPU tensor"):
        run(x.double())
