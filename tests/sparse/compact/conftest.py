import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from converters.conversion import convert


class Net(nn.Module):
    """Convolutions, grouped too, a norm, attention and a head: every kind of sparse weight."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 16, 3, groups=4, stride=2, bias=False)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = torch.relu(self.grouped(torch.relu(self.norm(self.first(x)))))
        tokens = x.flatten(2).transpose(1, 2)
        return self.head(self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1))


@pytest.fixture
def pair():
    """Returns a maker of one sparse model in both storages; the compact one rebuilds dense weights, bit for bit."""

    def make(sparsity=0.8, **more):
        torch.manual_seed(0)
        masked = convert(Net(), sparsity=sparsity, keep_dense=[], **more)
        compact = copy.deepcopy(masked).to_storage("compact")
        compact.store.kernels = False
        return masked, compact

    return make


@pytest.fixture
def steps():
    """Returns a function that trains models side by side on the same batches, and yields their losses."""

    def take(pairs, count, seed=1):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            images = torch.randn(6, 3, 9, 9, generator=generator)
            labels = torch.randint(10, (6,), generator=generator)
            losses = []
            for model, optimizer in pairs:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(images), labels)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            yield losses

    return SimpleNamespace(take=take)
