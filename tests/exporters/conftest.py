"""Small sparse models, and the graph of one that is captured once."""

import pytest
import torch
from torch import nn

from dsr_tool.sparse.sparsify import sparsify
from dsr_tool.sparse.trace import trace
from dsr_tool.sparsity.budget import Budget
from dsr_tool.sparsity.config import ModelConfig

SHAPE = (3, 16, 16)


def _network(classes=10):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, stride=2, groups=32),
        nn.Conv2d(32, 48, 1, bias=False),
        nn.BatchNorm2d(48),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(192, 64),
        nn.ReLU(),
        nn.Linear(64, classes),
    )
    with torch.no_grad():
        network(torch.randn(8, *SHAPE))  # norm statistics that are not 0 and 1
    return network


@pytest.fixture
def make_model():
    """Builds a sparse model of a few layers; the same arguments give the same model."""

    def make(sparsity=0.8, classes=10, input_shape=SHAPE):
        config = ModelConfig("module", "Small", classes, input_shape)
        budget = Budget(sparsity=sparsity)
        return sparsify(_network(classes), config, budget, positions="random")

    return make


@pytest.fixture(scope="session")
def captured():
    """Returns the graph of that model."""
    return trace(_network(), SHAPE)


@pytest.fixture
def trace_once(monkeypatch, captured):
    """Lets exports use the graph that was captured already, which saves a second for each."""
    monkeypatch.setattr("exporters.checked.trace", lambda module, shape: captured)
