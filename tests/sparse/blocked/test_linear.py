"""Sparse linear layers agree with torch's own, forward and backward, for rows of any number."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from dsr_tool.runtime.kernels.training import CALLS, available
from dsr_tool.sparse.blocked.linear import linear
from dsr_tool.sparse.blocked.plans import Plans

pytestmark = pytest.mark.skipif(not available(), reason="no kernels were built here")


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32), st.lists(st.integers(1, 9), max_size=2), st.integers(1, 20), st.integers(1, 90),
    st.integers(1, 60), st.sampled_from((0.0, 0.1, 1.0)), st.booleans(),
)  # fmt: skip
def test_linear_layers_agree_with_torch(seed, batch, rows, features, out_features, density, with_bias):
    generator = torch.Generator().manual_seed(seed)
    shape = (out_features, features)
    weight = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < density)
    positions = weight.view(-1).nonzero().view(-1).int()
    x = torch.randn(*batch, rows, features, generator=generator)
    bias = torch.randn(out_features, generator=generator) if with_bias else None
    gradient = torch.randn(*batch, rows, out_features, generator=generator)
    ours = [x.clone().requires_grad_(), weight.view(-1)[positions.long()].clone().requires_grad_()]
    theirs = [x.double().requires_grad_(), weight.double().requires_grad_()]
    before = CALLS["dsr_conv"]
    out = linear(*ours, positions, out_features, Plans(), "layer", 0, bias)
    expected = functional.linear(*theirs, None if bias is None else bias.double())
    out.backward(gradient)
    expected.backward(gradient.double())
    assert CALLS["dsr_conv"] == before + 2
    pairs = ((out, expected), (ours[0].grad, theirs[0].grad), (ours[1].grad, theirs[1].grad.view(-1)[positions.long()]))
    for a, b in pairs:
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
