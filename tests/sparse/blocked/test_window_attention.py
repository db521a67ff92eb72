"""What stands for a sparse weight calls kernels for products, and is the dense weight anywhere else."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torchvision.models.swin_transformer import ShiftedWindowAttention

from dsr_tool.runtime.kernels.training import available
from dsr_tool.sparse.blocked.runner import Runner
from dsr_tool.sparse.blocked.window_attention import StandIn


@pytest.fixture
def standing():
    """Returns a stand-in, its dense weight, and the list of products that it was asked for."""
    weight, asked = torch.randn(4, 3, requires_grad=True), []

    def multiply(x, bias):
        asked.append(bias)
        return x @ weight.t() + (0 if bias is None else bias)

    return StandIn(multiply, lambda: weight), weight, asked


def test_products_of_rows_go_to_the_kernels(standing):
    stand_in, weight, asked = standing
    x, bias = torch.randn(2, 5, 3), torch.randn(4)
    for made, added in (
        (functional.linear(x, stand_in), None),
        (functional.linear(x, stand_in, bias), bias),
        (functional.linear(x, weight=stand_in, bias=bias), bias),
    ):
        assert torch.equal(made, x @ weight.t() + (0 if added is None else added))
    assert len(asked) == 3


def test_anything_else_gets_the_dense_weight(standing):
    stand_in, weight, asked = standing
    assert stand_in.shape == (4, 3)
    assert torch.equal(torch.cat([stand_in, stand_in]), torch.cat([weight, weight]))
    assert torch.equal(functional.linear(stand_in, stand_in), weight @ weight.t())
    torch.sum(stand_in).backward()
    assert torch.equal(weight.grad, torch.ones(4, 3))
    assert not asked


class Rescaled(ShiftedWindowAttention):
    """Reads a weight in a way of its own."""

    def forward(self, x):
        return super().forward(x) * self.proj.weight.norm()


@pytest.mark.skipif(not available(), reason="needs the compiled kernels")
@pytest.mark.parametrize(("kind", "fast"), [(ShiftedWindowAttention, True), (Rescaled, False)])
def test_only_code_that_is_known_gets_it(networks, kind, fast):
    network = nn.Sequential(kind(16, [2, 2], [1, 1], 2), nn.Linear(16, 4))
    found = networks.compare(network, torch.randn(3, 4, 4, 16))
    found.check()
    assert found.runner.coverage.sparse_on_kernels == (3 if fast else 1)
    assert found.calls["dsr_conv_weights"] == (3 if fast else 1)
    assert list(found.runner.coverage.notes) == ["0"]


@pytest.mark.skipif(not available(), reason="needs the compiled kernels")
def test_outside_of_a_pass_its_weights_are_dense_tensors(networks):
    network, store, _ = networks.compact(nn.Sequential(ShiftedWindowAttention(16, [2, 2], [1, 1], 2)))
    Runner(network, store)(torch.randn(3, 4, 4, 16))
    assert type(network[0].qkv.weight) is torch.Tensor
