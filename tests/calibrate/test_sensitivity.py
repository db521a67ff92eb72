"""Cost curves of layers. Pruning each layer for real, and the KL divergence of the outputs, are the referee."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from dsr_tool.calibrate import sensitivity
from dsr_tool.calibrate.gradients import DENSITIES
from dsr_tool.calibrate.sensitivity import measure
from dsr_tool.errors import UsageError
from dsr_tool.sparse.discover import Rules, discover


def specs_of(module):
    return discover(module, Rules(small_layers=False))


def pictures(count=16, seed=1):
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


class Branches(nn.Module):
    """A bottleneck that everything passes, and a branch whose output counts for little."""

    def __init__(self, share):
        super().__init__()
        self.stem, self.branch, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 4)
        self.share = share

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + self.share * self.branch(x))


def test_a_branch_that_counts_for_little_costs_less_than_what_everything_passes():
    torch.manual_seed(0)
    module = Branches(0.1)
    curves = measure(module, specs_of(module), torch.randn(32, 12)).layers
    for density in (0.1, 0.3, 0.5):
        count = round(144 * density)
        assert curves["branch.weight"].cost(count) < 0.2 * curves["stem.weight"].cost(count)


def test_a_layer_that_nothing_reads_costs_nothing_and_gets_its_floor():
    torch.manual_seed(0)
    module = Branches(0.0)
    module.unused = nn.Linear(12, 12)
    curves = measure(module, specs_of(module), torch.randn(16, 12))
    names = list(curves.layers)
    assert not curves.layers["branch.weight"].costs.any() and not curves.layers["unused.weight"].costs.any()
    counts = dict(zip(names, curves.spread(200), strict=True))
    assert counts["branch.weight"] == counts["unused.weight"] == 12 < counts["stem.weight"]


def test_costs_are_about_the_divergence_of_the_outputs():
    # Without biases that could give a mean back: the inputs have mean 0 instead.
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(20, 20, bias=False), nn.Linear(20, 6, bias=False))
    x = torch.randn(64, 20)
    x = torch.cat([x, -x])[torch.arange(128).reshape(2, 64).T.reshape(-1)]
    curve = measure(module, specs_of(module), x).layers["0.weight"]
    weight = module[0].weight.detach().clone()
    x = x[:64]
    score = (weight.abs() * x.square().mean(0).sqrt()).reshape(-1)
    with torch.no_grad():
        dense = module(x).log_softmax(1)
        for density in (0.2, 0.4, 0.7):
            mask = torch.zeros(400, dtype=torch.bool)
            mask[score.topk(round(400 * density)).indices] = True
            module[0].weight.copy_(weight * mask.reshape(20, 20))
            pruned = module(x).log_softmax(1)
            measured = float((dense.exp() * (dense - pruned)).sum(1).mean())
            assert 0.5 < curve.cost(round(400 * density)) / measured < 2


def test_a_mean_that_a_bias_can_give_back_costs_nothing():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
    constant = torch.randn(6).expand(16, 6) + 1e-4 * torch.randn(16, 6)
    varied = torch.randn(6) + torch.randn(16, 6)
    still, moving = (measure(module, specs_of(module), x).layers["0.weight"].cost(6) for x in (constant, varied))
    assert still < 1e-4 * moving


def test_totals_are_exact_and_the_same_every_time(network):
    module, x = network.eval(), pictures()
    first, second = (measure(module, specs_of(module), x, seed=3) for _ in range(2))
    size = sum(curve.size for curve in first.layers.values())
    for total in range(3, size + 1, 37):
        counts = first.spread(total)
        assert counts == second.spread(total) and sum(counts) == total


def test_multiply_adds_are_met_from_below(network):
    module = network.eval()
    curves = measure(module, specs_of(module), pictures())
    prices = [36.0, 36.0, 1.0]
    limit = 0.4 * sum(price * curve.size for price, curve in zip(prices, curves.layers.values(), strict=True))
    work = sum(price * count for price, count in zip(prices, curves.spread_for(prices, limit), strict=True))
    assert limit - 36 < work <= limit


@pytest.mark.parametrize("training", [False, True])
def test_the_module_stays_as_it_is(training, network):
    module = network.train(training)
    module[3].weight.requires_grad_(False)
    module[0].weight.grad = torch.ones_like(module[0].weight)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = torch.get_rng_state()
    measure(module, specs_of(module), pictures(4))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert module.training is training and module[1].training is training
    assert not module[3].weight.requires_grad and module[0].weight.requires_grad
    assert module[0].weight.grad.eq(1).all() and module[7].weight.grad is None
    assert not module[0]._forward_hooks and not module[0]._forward_pre_hooks


class Nested(nn.Module):
    """Outputs of other kinds than logits, by way of layers that are no plain modules."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up = nn.ConvTranspose1d(5, 6, 3, groups=1)
        self.table = nn.Embedding(5, 8)

    def forward(self, x):
        y, _ = self.attention(x, x, x, need_weights=False)
        y = self.up(y + self.table(torch.arange(5)))
        return {"out": y, "extra": [y.square(), torch.arange(3)]}


def test_outputs_may_be_nested_and_layers_of_any_kind():
    torch.manual_seed(0)
    module = Nested()
    curves = measure(module, specs_of(module), torch.randn(8, 5, 8)).layers
    assert set(curves) == {
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "up.weight",
        "table.weight",
    }
    assert all(curve.costs[0] > 0 for curve in curves.values())


def test_relative_squared_error_is_the_cost_of_other_outputs():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 16, bias=False))
    x = torch.randn(64, 16)
    curve = measure(module, specs_of(module), x, classifier=False).layers["0.weight"]
    # All of the only layer pruned: all of the output is lost, but for its mean.
    assert curve.cost(0) == pytest.approx(1.0, rel=0.35)


def test_grouped_and_transposed_layers_find_the_inputs_of_their_weights():
    torch.manual_seed(0)
    for layer in (nn.Conv1d(4, 6, 3, groups=2), nn.ConvTranspose1d(4, 6, 3, groups=2)):
        x = torch.randn(16, 4, 9)
        x[:, 1] *= 100  # the weights that read channel 1 matter most
        curve = measure(layer, specs_of(layer), x, classifier=False).layers["weight"]
        assert curve.cost(9) < 1e-2 * curve.cost(0)


def test_nan_is_named(network):
    module = network.eval()
    x = pictures()
    x[2] = math.nan
    with pytest.raises(UsageError, match="picture 3 contains NaN"):
        measure(module, specs_of(module), x)


def test_outputs_without_a_gradient_are_refused():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x).detach()

    with pytest.raises(UsageError, match="no gradient"):
        measure(Constant(), specs_of(Constant()), torch.randn(2, 4))


def test_progress_grows_to_the_end(network):
    seen = []
    measure(network.eval(), specs_of(network), pictures(8), on_progress=lambda *numbers: seen.append(numbers))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]


def test_densities_end_at_one():
    assert DENSITIES[-1] == 1.0 and np.all(np.diff(DENSITIES) > 0)


def test_slow_networks_go_by_gradients_alone(monkeypatch, network):
    module, x = network.eval(), pictures()
    trials = measure(module, specs_of(module), x)
    monkeypatch.delattr(sensitivity, "prune_each")
    specs = {name: replace(spec, macs_per_weight=1e12) for name, spec in specs_of(module).items()}
    alone = measure(module, specs, x)
    for name, curve in alone.layers.items():
        assert 0.05 < curve.cost(curve.size // 4) / trials.layers[name].cost(curve.size // 4) < 20


def test_a_smooth_curve_passes_through_its_trials_and_ends_at_zero():
    errors = (1 - np.array(DENSITIES)) ** 2
    noisy = 5 * errors * np.exp(np.random.default_rng(0).normal(0, 0.5, len(errors)))
    smooth = sensitivity._smooth(noisy, errors)
    assert smooth[-1] == 0 and np.all(np.diff(smooth) < 0)
    assert np.exp(np.mean(np.log(smooth[10:-5] / errors[10:-5]))) == pytest.approx(5, rel=0.3)
    through = sensitivity._through(smooth, [20, 8], [0.7, 2 * float(smooth[8])])
    assert through[20] == pytest.approx(0.7) and through[[8, 0]] == pytest.approx(2 * smooth[[8, 0]])
    assert np.array_equal(sensitivity._through(smooth, [8], [None]), smooth)
