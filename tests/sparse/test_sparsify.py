"""Sparsifier: layer budgets and positions from importances, spreads and for layers that were never trained."""

import pytest
import torch
from torch import nn

from dsr_tool.errors import UsageError
from dsr_tool.sparse.sparsify import Sparsifier
from dsr_tool.sparsity.budget import Budget
from dsr_tool.sparsity.config import ModelConfig
from dsr_tool.sparsity.distribution import floors

NAMES = ["0.weight", "1.weight", "2.weight"]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(8, 64, 3), nn.Conv2d(64, 64, 3), nn.Conv2d(64, 32, 3))


def sparsifier(**options):
    return Sparsifier(network(), ModelConfig("module", "Small", 2, ()), **options)


def masks(total, **options):
    return sparsifier(**options).preview(total, Budget.of_sparsity(0.9)).masks


def test_lamp_is_exact_and_keeps_the_floors():
    made = sparsifier(distribution="lamp")
    for total in (made.least, 5000, made.prunable):
        counts = made.counts(total)
        assert sum(counts.values()) == total
        shapes = [spec.shape for spec in made.sparse]
        assert all(n >= floor for n, floor in zip(counts.values(), floors(total, shapes), strict=True))


def test_a_budget_below_the_floors_names_the_highest_sparsity():
    made = sparsifier(distribution="lamp")
    with pytest.raises(UsageError, match=r"highest sparsity is 0\.99"):
        made.active_weights(Budget.of_sparsity(0.999))
    allowed = sparsifier(distribution="lamp", allow_starved=True)
    assert sum(allowed.counts(allowed.active_weights(Budget.of_sparsity(0.999))).values()) == round(
        made.prunable / 1000
    )


def test_importances_rank_positions_and_budgets():
    importance = {name: weight.detach().abs() for name, weight in network().named_parameters() if name in NAMES}
    even = masks(6000, distribution="lamp")
    importance["1.weight"] = importance["1.weight"].flip(0)
    turned = masks(6000, distribution="lamp", importance=importance)
    assert torch.equal(turned["0.weight"], even["0.weight"])
    # The same values in another order: as many weights, at mirrored places.
    assert torch.equal(turned["1.weight"], even["1.weight"].flip(0))


def test_fresh_layers_get_an_even_share_at_random_positions():
    total = 6000
    trained, fresh = masks(total, distribution="lamp"), masks(total, distribution="lamp", fresh=["1.weight"])
    share = total / sum(mask.numel() for mask in fresh.values())
    assert int(fresh["1.weight"].sum()) == pytest.approx(share * fresh["1.weight"].numel(), abs=1)
    assert sum(int(mask.sum()) for mask in fresh.values()) == total
    kept = (fresh["1.weight"] & trained["1.weight"]).sum() / fresh["1.weight"].sum()
    assert kept < 3 * share
    assert torch.equal(fresh["1.weight"], masks(total, distribution="magnitude", fresh=["1.weight"])["1.weight"])


@pytest.mark.parametrize("distribution", ["uniform", "erk", "magnitude", "lamp"])
def test_every_distribution_is_exact_with_all_layers_fresh(distribution):
    counts = sparsifier(distribution=distribution, fresh=NAMES).counts(5000)
    assert sum(counts.values()) == 5000


def test_a_spread_decides_and_is_recorded():
    made = sparsifier(distribution="file", spread=lambda total: [100, 200, total - 300])
    model = made.preview(1000, Budget.of_sparsity(0.9))
    assert [int(mask.sum()) for mask in model.masks.values()] == [100, 200, 700]
    assert model.config.conversion["distribution"] == "file"


def test_kernels_of_an_importance_stay_whole():
    importance = {name: torch.rand(weight.shape) for name, weight in network().named_parameters() if name in NAMES}
    model = sparsifier(distribution="lamp", granularity="kernel", importance=importance).preview(
        6000, Budget.of_sparsity(0.9)
    )
    for name, mask in model.masks.items():
        kernels = mask.flatten(2).float().mean(2)
        assert set(kernels.unique().tolist()) <= {0.0, 1.0}
        means = importance[name].flatten(2).mean(2)
        assert means[kernels == 1].min() >= means[kernels == 0].max()
