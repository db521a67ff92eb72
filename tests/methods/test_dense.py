"""Dense training compared with torch's optimizer alone, and the models that it refuses."""

import pytest
import torch
from torch import nn, optim

from converters.conversion import convert
from dsr_tool.errors import UsageError
from dsr_tool.methods import attach, make


def trained(model, method):
    torch.manual_seed(0)
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if method is not None:
        attach(convert(model, sparsity=0, input_shape=(6,)), optimizer, method)
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(16, 6)), torch.randint(0, 4, (16,))).backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def test_dense_training_equals_the_optimizer_alone():
    assert all(torch.equal(a, b) for a, b in zip(trained(network(), "dense"), trained(network(), None), strict=True))


def test_a_sparse_model_is_refused():
    model = convert(network(), sparsity=0.5, input_shape=(6,))
    with pytest.raises(UsageError, match=r"40 of this model's 80 are inactive.*--sparsity 0"):
        attach(model, optim.SGD(model.module.parameters(), lr=0.1), "dense")


def test_dense_has_no_options_and_no_updates():
    with pytest.raises(UsageError, match="drop-fraction goes with method"):
        make("dense", 100, drop_fraction=0.3)
    assert not any(make("dense", 100).due(step) for step in range(1, 101))
