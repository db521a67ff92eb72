import pytest
import torch
from torch import nn

from converters.conversion import convert


class Loop:
    """A small network in a loop of one's own: what its user has at hand."""

    def __init__(self, storage="masked", freeze=(), sparsity=0.8, seed=0, positions="random"):
        torch.manual_seed(seed)
        self.net = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(64, 32),
            nn.ReLU(),
            nn.Linear(32, 10),
        )
        for name, parameter in self.net.named_parameters():
            parameter.requires_grad_(name.partition(".")[0] not in freeze)
        self.model = convert(
            self.net, sparsity=sparsity, input_shape=(3, 8, 8), positions=positions, storage=storage, keep_dense=[]
        )
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(16, 3, 8, 8, generator=generator)
        self.labels = torch.randint(10, (16,), generator=generator)

    def loss(self):
        return nn.functional.cross_entropy(self.net(self.images), self.labels)

    def backward(self):
        self.net.zero_grad()
        loss = self.loss()
        loss.backward()
        return loss

    def step(self, *optimizers):
        self.backward()
        for optimizer in optimizers:
            optimizer.step()

    def outside(self):
        """Returns the number of non-zeros outside the masks."""
        masks = self.model.masks
        return sum(
            int(w.detach().masked_fill(masks[name], 0.0).count_nonzero()) for name, w in self.model.weights.items()
        )


@pytest.fixture
def loop():
    """Returns the maker of a network in a loop of one's own."""
    return Loop
