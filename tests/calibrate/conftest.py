"""The small network that several tests of the room prune and measure."""

from __future__ import annotations

import pytest
import torch
from torch import nn


@pytest.fixture
def network():
    """A fresh network in training mode: a norm, a convolution in groups, and a linear layer behind a pool."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 5),
    )
