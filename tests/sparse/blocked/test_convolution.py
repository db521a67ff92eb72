"""Sparse convolutions in the blocked layout agree with torch's own, forward and backward."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from dsr_tool.runtime.kernels.training import available
from dsr_tool.sparse.blocked.convolution import CALLS, Geometry, Plans, convolve, convolve_dense
from dsr_tool.sparse.blocked.layout import block, unblock

pytestmark = pytest.mark.skipif(not available(), reason="no kernels were built here")


def torchs(x, weight, geometry, bias):
    (top, bottom), (left, right) = geometry.pads
    padded = functional.pad(x, (left, right, top, bottom))
    return functional.conv2d(padded, weight, bias, geometry.stride, 0, geometry.dilation, geometry.groups)


def sparse_weight(geometry, density, seed=0):
    """Returns a dense weight with zeros, the positions of its non-zeros, and these."""
    generator = torch.Generator().manual_seed(seed)
    shape = (geometry.out_channels, geometry.in_channels // geometry.groups, *geometry.kernel)
    weight = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < density)
    positions = weight.view(-1).nonzero().view(-1).int()
    return weight, positions, weight.view(-1)[positions.long()].clone()


def outputs(function, x, weight, bias, gradient):
    """Returns the result of a function and its gradients to all three arguments."""
    leaves = [each.clone().requires_grad_() for each in (x, weight, bias)]
    out = function(*leaves)
    out.backward(gradient.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def check(geometry, height, width, images, lanes, density, seed=0):
    """Asserts that our errors, beside torch in float64, are no larger than a few of torch's own in float32."""
    generator = torch.Generator().manual_seed(seed)
    weight, positions, values = sparse_weight(geometry, density, seed)
    x = torch.randn(images, geometry.in_channels, height, width, generator=generator)
    bias = torch.randn(geometry.out_channels, generator=generator)
    gradient = torch.randn(images, geometry.out_channels, *geometry.output_size(height, width), generator=generator)
    plans = Plans()

    def ours(x, values, bias):
        return unblock(convolve(block(x, lanes), values, positions, geometry, plans, "layer", 0, bias), images)

    def dense(x, weight, bias):
        return torchs(x, weight, geometry, bias)

    before = CALLS.copy()
    found = outputs(ours, x, values, bias, gradient)
    ran = CALLS - before
    assert {name: ran[name] for name in ("dsr_conv", "dsr_conv_weights", "dsr_channel_sums")} == {
        "dsr_conv": 2, "dsr_conv_weights": 1, "dsr_channel_sums": 1,
    }  # fmt: skip
    assert len(plans) == 2
    theirs = outputs(dense, x, weight, bias, gradient)
    exact = outputs(dense, x.double(), weight.double(), bias.double(), gradient)
    for each in (theirs, exact):
        each[2] = each[2].view(-1)[positions.long()]
    # Gradients of weights and biases are sums over all pixels. These may cancel, and then the rounding errors of the
    # terms are left; inputs have a variance of 1, so products have the norm of the gradient.
    terms = torch.linalg.vector_norm(gradient, dim=(0, 2, 3)).max()
    for a, b, c, least in zip(found, theirs, exact, (0.0, 0.0, terms, terms), strict=True):
        if c.numel():
            scale = max(c.abs().max(), least)
            assert (a - c).abs().max() <= 4 * (b - c).abs().max() + 4e-7 * scale


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32), st.sampled_from(((1, 1), (3, 3), (5, 5), (2, 3))), st.sampled_from(((1, 1), (2, 2), (1, 2))),
    st.sampled_from(((0, 0), (1, 1), ((0, 1), (2, 0)))), st.sampled_from((1, 2)), st.sampled_from((1, 2, 6)),
    st.sampled_from((4, 8, 16)), st.integers(1, 40), st.sampled_from((0.1, 0.5, 1.0)), st.data(),
)  # fmt: skip
def test_results_and_gradients_are_as_exact_as_torchs(
    seed, kernel, stride, padding, dilation, groups, lanes, images, density, data
):
    channels, rows = groups * data.draw(st.integers(1, 4)), groups * data.draw(st.integers(1, 4))
    geometry = Geometry(rows, channels, kernel, stride, padding, (dilation, dilation), groups)
    height, width = (data.draw(st.integers((k - 1) * dilation + 1, 14)) for k in kernel)
    check(geometry, height, width, images, lanes, density, seed)


def test_a_layer_as_large_as_those_of_networks_is_as_exact_as_torchs():
    check(Geometry(96, 128, (3, 3), (1, 1), (1, 1)), 14, 14, 20, 16, 0.1)


def test_only_the_gradients_that_are_asked_for_are_computed():
    geometry = Geometry(4, 3, (3, 3), (1, 1), (1, 1))
    _, positions, values = sparse_weight(geometry, 0.5)
    before = CALLS.copy()
    convolve(
        torch.randn(1, 3, 5, 5, 4), values.requires_grad_(), positions, geometry, Plans(), "layer", 0
    ).sum().backward()
    assert CALLS - before == {"dsr_conv": 1, "dsr_conv_weights": 1}


def test_second_derivatives_are_refused():
    geometry = Geometry(4, 3)
    _, positions, values = sparse_weight(geometry, 1.0)
    x = torch.randn(1, 3, 5, 5, 4, requires_grad=True)
    out = convolve(x, values, positions, geometry, Plans(), "layer", 0).square().sum()
    (gradient,) = torch.autograd.grad(out, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_a_plan_is_made_again_when_the_positions_have_changed():
    geometry, plans, x = Geometry(2, 2), Plans(), torch.randn(1, 2, 3, 3, 4)
    one = torch.ones(1)
    first = convolve(x, one, torch.tensor([0], dtype=torch.int32), geometry, plans, "layer", 0)
    second = convolve(x, one, torch.tensor([3], dtype=torch.int32), geometry, plans, "layer", 1)
    torch.testing.assert_close(first[:, 0], x[:, 0])
    torch.testing.assert_close(second[:, 1], x[:, 1])
    assert not second[:, 0].any()
    assert len(plans) == 1


def test_a_backward_pass_uses_the_positions_of_its_forward_pass():
    geometry, plans, x = Geometry(2, 2), Plans(), torch.randn(1, 2, 3, 3, 4)
    values = torch.ones(1, requires_grad=True)
    out = convolve(x, values, torch.tensor([0], dtype=torch.int32), geometry, plans, "layer", 0)
    convolve(x, values, torch.tensor([3], dtype=torch.int32), geometry, plans, "layer", 1)
    out.sum().backward()
    torch.testing.assert_close(values.grad, x[:, 0].sum().view(1))


def test_copies_and_pickles_of_plans_are_empty():
    geometry, plans = Geometry(2, 2), Plans()
    convolve(torch.randn(1, 2, 3, 3, 4), torch.ones(1), torch.zeros(1, dtype=torch.int32), geometry, plans, "layer", 0)
    assert plans.bytes > 0
    for other in (copy.deepcopy(plans), pickle.loads(pickle.dumps(plans))):  # noqa: S301 - of this process
        assert (len(other), other.bytes) == (0, 0)
    plans.clear()
    assert plans.bytes == 0


@pytest.mark.parametrize("geometry", [
    Geometry(8, 6), Geometry(8, 6, (1, 1), (2, 2)), Geometry(8, 3, (7, 7), (2, 2), (3, 3)),
    Geometry(8, 3, (3, 3), (2, 2), ((0, 1), (0, 1))), Geometry(6, 6, (3, 3), (1, 1), (1, 1), (1, 1), 6),
])  # fmt: skip
@pytest.mark.parametrize("with_bias", [True, False])
def test_dense_weights_agree_with_torch(geometry, with_bias):
    weight, _, _ = sparse_weight(geometry, 1.0)
    x, bias = torch.randn(20, geometry.in_channels, 12, 9), torch.randn(geometry.out_channels)
    gradient = torch.randn(20, geometry.out_channels, *geometry.output_size(12, 9))

    def ours(x, weight, bias):
        start = bias if with_bias else None
        return unblock(convolve_dense(block(x, 16), weight, geometry, start), 20) + 0 * bias.sum()

    def theirs(x, weight, bias):
        return torchs(x, weight, geometry, bias if with_bias else None) + 0 * bias.sum()

    found, expected = (outputs(function, x, weight, bias, gradient) for function in (ours, theirs))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_dense_layers_with_few_weights_of_each_output_run_on_the_kernels():
    x = torch.randn(1, 6, 9, 9, 16)
    for geometry, calls in (
        (Geometry(4, 6, (3, 3)), 0),
        (Geometry(4, 6, (2, 2)), 1),
        (Geometry(6, 6, (3, 3), groups=6), 1),
    ):
        before = CALLS.copy()
        convolve_dense(x, torch.randn(geometry.out_channels, 6 // geometry.groups, *geometry.kernel), geometry)
        assert (CALLS - before)["dsr_conv"] == calls


@pytest.mark.parametrize(("change", "message"), [
    ({"x": torch.zeros(1, 3, 5, 5, 4)}, "(1, 3, 5, 5, 4)"),
    ({"x": torch.zeros(1, 2, 5, 5, 6)}, "4, 8 or 16 lanes"),
    ({"x": torch.zeros(1, 2, 5, 5, 4, dtype=torch.float64)}, "float64"),
    ({"x": torch.zeros(1, 2, 2, 5, 4)}, "larger than the input"),
    ({"values": torch.zeros(2)}, "both must be (nnz,)"),
    ({"positions": torch.zeros(1, dtype=torch.int64)}, "int64"),
    ({"bias": torch.zeros(3)}, "it must be (2,)"),
])  # fmt: skip
def test_arguments_that_the_kernels_do_not_take_are_refused(change, message):
    arguments = {
        "x": torch.zeros(1, 2, 5, 5, 4), "values": torch.zeros(1), "positions": torch.zeros(1, dtype=torch.int32),
        "geometry": Geometry(2, 2, (3, 3)), "plans": Plans(), "name": "layer", "version": 0, **change,
    }  # fmt: skip
    with pytest.raises(ValueError) as raised:
        convolve(**arguments)
    assert message in str(raised.value)
