"""Layers pruned one at a time. A whole pass of a pruned copy is the referee."""

import copy

import pytest
import torch
from torch import nn

from dsr_tool.calibrate.trials import distance, is_classifier, prune_each


def masks_of(module):
    generator = torch.Generator().manual_seed(2)
    return {
        name: [torch.rand(weight.shape, generator=generator) < density for density in (0.7, 0.2)]
        for name, weight in module.named_parameters()
        if weight.dim() > 1
    }


@torch.no_grad()
def by_hand(module, name, mask, x):
    """Returns the outputs of a copy with one pruned layer whose bias gives the mean back."""
    pruned = copy.deepcopy(module).eval()
    owner = pruned.get_submodule(name.rpartition(".")[0])
    seen = []
    hook = owner.register_forward_hook(lambda m, args, out: seen.append(out))
    pruned(x)
    owner.weight.mul_(mask)
    pruned(x)
    hook.remove()
    axes = [0, *range(2, seen[0].dim())]
    shift = seen[0].mean(axes) - seen[1].mean(axes)
    owner.bias = nn.Parameter(shift if owner.bias is None else owner.bias + shift)
    return pruned(x)


def test_distances_are_those_of_a_pruned_copy(network):
    module = network
    x = torch.randn(12, 3, 6, 6)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    masks = masks_of(module)
    found = prune_each(module, masks, x, classifier=True)
    assert found.keys() == masks.keys() and module.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    with torch.no_grad():
        dense = copy.deepcopy(module).eval()(x)
    for name, tried in masks.items():
        for mask, cost in zip(tried, found[name], strict=True):
            assert cost == pytest.approx(distance(by_hand(module, name, mask, x), dense, True), rel=1e-3, abs=1e-6)


def test_a_full_mask_changes_nothing(network):
    module = network
    full = {name: [torch.ones_like(masks[0])] for name, masks in masks_of(module).items()}
    costs = prune_each(module, full, torch.randn(4, 3, 6, 6), classifier=True)
    assert all(cost == pytest.approx(0, abs=1e-9) for (cost,) in costs.values())


def test_a_layer_that_nothing_calls_changes_nothing():
    module = nn.Sequential(nn.Linear(6, 6))
    module[0].spare = nn.Linear(6, 6)
    none = torch.zeros(6, 6, dtype=torch.bool)
    costs = prune_each(module, {"0.spare.weight": [none, none], "0.weight": [none]}, torch.randn(8, 6), False)
    assert costs["0.spare.weight"] == [0, 0] and costs["0.weight"][0] > 0.1


def test_a_layer_that_is_used_twice_is_pruned_in_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x):
            return self.layer(self.layer(x).relu())

    torch.manual_seed(0)
    module, x, mask = Twice(), torch.randn(8, 6), torch.rand(6, 6) < 0.5
    (cost,) = prune_each(module, {"layer.weight": [mask]}, x, classifier=False)["layer.weight"]
    with torch.no_grad():
        dense = module(x)
        module.layer.weight.mul_(mask)
        assert cost == pytest.approx(distance(module(x), dense, False), rel=1e-4)


def test_outputs_of_other_sizes_have_no_distance():
    class Choosing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6, bias=False)

        def forward(self, x):
            y = self.layer(x)
            return [{"boxes": y[y > 0]}]

    module = Choosing()
    none = torch.zeros(6, 6, dtype=torch.bool)
    assert prune_each(module, {"layer.weight": [none]}, torch.randn(8, 6), False)["layer.weight"] == [None]


@torch.no_grad()
def test_the_distance_of_classifiers_is_the_divergence_and_else_the_relative_square():
    p, q = torch.randn(4, 5), torch.randn(4, 5)
    divergence = nn.functional.kl_div(q.log_softmax(1), p.log_softmax(1), log_target=True, reduction="batchmean")
    assert distance(q, p, True) == pytest.approx(float(divergence), rel=1e-5)
    assert distance(1.1 * p, p, False) == pytest.approx(0.01, rel=1e-4)
    nested = {"out": [p, torch.arange(3)], "aux": (p,)}
    assert distance({"out": [1.1 * p, torch.arange(3)], "aux": (p,)}, nested, False) == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (torch.zeros(2, 5), True),
        (torch.zeros(2, 1), False),
        (torch.zeros(2, 5, 3), False),
        ([torch.zeros(2, 5)], False),
    ],
)
def test_logits_are_one_matrix(output, expected):
    assert is_classifier(output) is expected
