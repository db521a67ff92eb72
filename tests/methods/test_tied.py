"""tied compared with a module that gathers its weights from a vector; values stay tied."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn, optim
from torch.nn.functional import cross_entropy

from converters.conversion import convert
from dsr_tool.errors import UsageError
from dsr_tool.methods import attach, make
from dsr_tool.methods.tied import hashed
from dsr_tool.sparsity.budget import Budget

OPTIMIZERS = {
    "sgd": lambda p: optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "fused sgd": lambda p: optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=1e-2, fused=True),
    "adam": lambda p: optim.Adam(p, 0.01, weight_decay=1e-2),
    "fused adamw": lambda p: optim.AdamW(p, 0.01, fused=True),
    "rmsprop": lambda p: optim.RMSprop(p, 0.01, momentum=0.9, weight_decay=1e-2),
}


class Gathered(nn.Module):
    """A linear layer whose weights are looked up in a vector of values."""

    def __init__(self, layer, values, seed, number):
        super().__init__()
        order, sign = hashed(layer.weight.numel(), seed, number)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order)) % values
        self.register_buffer("place", place.view(layer.weight.shape))
        self.register_buffer("sign", sign.view(layer.weight.shape).to(layer.weight.dtype))
        flat = order[:values]
        self.values = nn.Parameter(layer.weight.detach().flatten()[flat] * self.sign.flatten()[flat])
        self.bias = nn.Parameter(layer.bias.detach().clone())

    @property
    def weight(self):
        return self.values[self.place] * self.sign

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "rmsprop"])
def test_training_equals_a_module_that_looks_its_weights_up(optimizer):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(11, 13), nn.Tanh(), nn.Linear(13, 5)).double()
    theirs = nn.Sequential(Gathered(net[0], 29, 7, 0), nn.Tanh(), Gathered(net[2], 13, 7, 1))
    model = convert(net, sparsity=0)
    assert Budget.of_sparsity("0.8").active_weights(208, 0, 2) == 29 + 13
    ours, reference = OPTIMIZERS[optimizer](net.parameters()), OPTIMIZERS[optimizer](theirs.parameters())
    attach(model, ours, make("tied", 100, final_sparsity="0.8"), seed=7)
    for _ in range(30):
        x, y = torch.randn(16, 11, dtype=torch.float64), torch.randint(5, (16,))
        for network, stepped in ((net, ours), (theirs, reference)):
            stepped.zero_grad()
            cross_entropy(network(x), y).backward()
            stepped.step()
        torch.testing.assert_close(net[0].weight, theirs[0].weight, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(net[2].weight, theirs[2].weight, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(net[2].bias, theirs[2].bias, rtol=1e-9, atol=1e-12)


def distinct(weight, values, seed, number):
    """Counts the distinct values of a layer, without their signs; fails if positions of a value differ."""
    order, sign = hashed(weight.numel(), seed, number)
    signed = (weight.detach().flatten() * sign)[order]
    assert torch.equal(signed, signed[:values].repeat(-(-len(order) // values))[: len(order)])
    return len(signed[:values])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_all_positions_of_a_value_stay_equal(optimizer):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 7, 3), nn.ReLU(), nn.Flatten(), nn.Linear(63, 37))
    model = convert(net, sparsity=0, input_shape=(3, 5, 5))
    stepped = OPTIMIZERS[optimizer](net.parameters())
    attached = attach(model, stepped, make("tied", 100, final_sparsity=0.9), seed=3)
    for _ in range(40):
        stepped.zero_grad()
        cross_entropy(net(torch.randn(8, 3, 5, 5)), torch.randint(37, (8,))).backward()
        stepped.step()
    # 189 and 2,331 weights: a tenth of them, spread in proportion.
    counts = [distinct(net[0].weight, 19, 3, 0), distinct(net[3].weight, 233, 3, 1)]
    assert sum(counts) == 252 == attached.last.facts["distinct_values"]
    assert model.sparsity == 0 and attached.step == 40


class Noisy(optim.SGD):
    """Treats equal weights unequally."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(torch.randn_like(parameter))


@pytest.mark.parametrize("used", [False, True])
def test_an_optimizer_that_treats_equal_weights_unequally_is_corrected(used):
    torch.manual_seed(0)
    net = nn.Linear(20, 20)
    model = convert(net, sparsity=0)
    stepped = optim.SGD(net.parameters(), 0.1, momentum=0.9) if used else Noisy(net.parameters(), 0.1)
    for _ in range(2):
        stepped.zero_grad()
        net(torch.randn(4, 20)).square().sum().backward()
        stepped.step()
    attach(model, stepped, make("tied", 9, final_sparsity=0.5))
    for _ in range(3):
        net(torch.randn(4, 20)).square().sum().backward()
        stepped.step()
        distinct(net.weight, 200, 0, 0)


@settings(max_examples=50)
@given(st.integers(1, 3000), st.integers(0, 2**63 - 1), st.integers(0, 50))
def test_the_hash_is_a_fixed_permutation_with_signs(count, seed, layer):
    order, sign = hashed(count, seed, layer)
    assert order.sort().values.tolist() == list(range(count))
    assert set(sign.tolist()) <= {1, -1}
    again = hashed(count, seed, layer)
    assert torch.equal(order, again[0]) and torch.equal(sign, again[1])
    assert count < 100 or not torch.equal(order, hashed(count, seed + 1, layer)[0])
    assert count < 100 or not torch.equal(order, hashed(count, seed, layer + 1)[0])


def test_the_hash_is_independent_of_the_position():
    order, sign = hashed(100_000, 0, 0)
    assert abs(int(sign.sum())) < 1500  # five deviations
    assert abs(torch.corrcoef(torch.stack([order.double(), torch.arange(100_000.0).double()]))[0, 1]) < 0.02
    assert abs(float(sign[order].double()[:10_000].mean())) < 0.05


def test_models_and_options_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match="tied needs the share of weights to save"):
        make("tied", 10)
    sparse = convert(nn.Linear(30, 40), sparsity=0.5)
    with pytest.raises(UsageError, match=r"has 600 of 1,200 weights; convert it with --sparsity 0"):
        attach(sparse, optim.SGD(sparse.module.parameters(), 0.1), make("tied", 9, final_sparsity=0.9))
    model = convert(nn.Linear(30, 40), sparsity=0)
    with pytest.raises(UsageError, match="highest reachable sparsity"):
        attach(model, optim.SGD(model.module.parameters(), 0.1), make("tied", 9, final_sparsity=0.9999))
    with pytest.raises(UsageError, match="LBFGS compares steps and gradients"):
        attach(model, optim.LBFGS(model.module.parameters()), make("tied", 9, final_sparsity=0.9))


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("kind", [optim.Adam, optim.SGD])
def test_closures_keep_the_ties(kind, clip):
    torch.manual_seed(0)
    model = convert(nn.Linear(30, 40), sparsity=0)
    optimizer = kind(model.module.parameters(), 0.1)
    attached = attach(model, optimizer, make("tied", 9, final_sparsity=0.9))
    target = torch.randn(4, 40)

    def closure():
        optimizer.zero_grad()
        loss = (model(torch.eye(4, 30)) - target).square().mean()
        loss.backward()
        if clip:
            attached.mask_gradients()
        return loss

    before = closure().item()
    for _ in range(3):
        optimizer.step(closure)
    assert closure().item() < before
    assert len(model.module.weight.detach().abs().unique()) <= 120


def test_an_optimizer_inside_another_one_takes_the_same_step():
    class Around(optim.Optimizer):
        def __init__(self, inner):
            super().__init__(inner.param_groups, {})
            self.inner = inner

        def step(self, closure=None):
            return self.inner.step(closure)

    ends = []
    for wrapped in (False, True):
        torch.manual_seed(0)
        model = convert(nn.Linear(30, 40), sparsity=0)
        optimizer = optim.SGD(model.module.parameters(), 0.1, momentum=0.9)
        optimizer = Around(optimizer) if wrapped else optimizer
        attached = attach(model, optimizer, make("tied", 9, final_sparsity=0.9))
        for _ in range(3):
            optimizer.zero_grad()
            (model(torch.eye(4, 30)) - 1).square().mean().backward()
            optimizer.step()
        assert attached.step == 3
        ends.append(model.module.weight.detach())
    assert torch.equal(*ends)
