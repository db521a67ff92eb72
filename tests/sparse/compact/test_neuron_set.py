"""neuron-set removes the same units in both storages."""

import copy

import pytest
import torch
from torch import nn, optim

from converters.conversion import convert
from dsr_tool.methods import attach
from dsr_tool.runtime.kernels.training import available
from dsr_tool.sparse.compact.modules import runner_of

SHAPE = (3, 8, 8)


@pytest.fixture
def models():
    """One model in both storages, some of whose hidden units are nearly unused."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 12, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(12 * 9, 40), nn.ReLU(), nn.Linear(40, 10),
    )  # fmt: skip
    with torch.no_grad():
        network[3].weight[:, ::3] *= 0.01
        network[8].weight[:, ::4] *= 0.01
    masked = convert(network, sparsity=0.6, keep_dense=[], input_shape=SHAPE)
    return masked, copy.deepcopy(masked).to_storage("compact")


def trained(models, count=30):
    generator, pairs = torch.Generator().manual_seed(1), []
    for model in models:
        optimizer = optim.SGD(model.module.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        method = attach(model, optimizer, "neuron-set", total_steps=count, seed=3, every=5)
        pairs.append((model, optimizer, method))
    for _ in range(count):
        images, labels = torch.randn(8, *SHAPE, generator=generator), torch.randint(10, (8,), generator=generator)
        losses = []
        for model, optimizer, _ in pairs:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        yield losses, [method for _, _, method in pairs]


def test_the_same_units_are_removed_and_the_same_weights_move(models):
    masked, compact = models
    compact.store.kernels = False
    before, counts = {name: mask.clone() for name, mask in masked.masks.items()}, masked.counts
    for (one, other), methods in trained(models):
        assert one == other
        assert (methods[0].last is None) == (methods[1].last is None)
    removed = [method.last.facts["removed_units"] for method in methods]
    assert removed[0] == removed[1] >= 10
    assert compact.counts == masked.counts == counts
    assert not all(torch.equal(mask, before[name]) for name, mask in masked.masks.items())
    state = compact.module.state_dict()
    assert all(torch.equal(mask, compact.masks[name]) for name, mask in masked.masks.items())
    assert all(torch.equal(value, state[name]) for name, value in masked.module.state_dict().items())
    dead = ~compact.masks["8.weight"].any(0)
    assert dead.sum() >= 5
    assert not compact.masks["6.weight"][dead].any()


def test_on_kernels_the_losses_are_the_same_to_rounding(models):
    compact = models[1]
    found = list(trained(models, 10))
    assert all(abs(one - other) < 1e-3 for (one, other), _ in found)
    _, methods = found[-1]
    assert methods[1].last.facts["removed_units"] == methods[0].last.facts["removed_units"] > 0
    if available():
        assert runner_of(compact.module).coverage.sparse_on_kernels == len(compact.masks)
