"""Moments of small networks. The referee measures them on normal inputs, for which the assumptions hold."""

import numpy as np
import pytest
import torch
from torch import nn

from dsr_tool.calibrate.importance import data_free_importance
from dsr_tool.calibrate.moments import Moments, input_moments, untrained
from dsr_tool.calibrate.norms import correct_norms
from dsr_tool.sparse.sparsify import Sparsifier
from dsr_tool.sparsity.budget import Budget
from dsr_tool.sparsity.config import ModelConfig

SHAPE = (8, 6, 6)


class Residual(nn.Module):
    """x + branch(x)."""

    def __init__(self, branch):
        super().__init__()
        self.branch = branch

    def forward(self, x):
        return x + self.branch(x)


class Shuffle(nn.Module):
    """Exchanges halves of the channels, joins them with others, and cuts some off."""

    def forward(self, x):
        n, c, h, w = x.shape
        y = x.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return torch.cat([y[:, c // 2 :], x[:, : c // 2]], 1)


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self):
        super().__init__()
        self.narrow, self.wide = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x):
        gate = self.wide(torch.relu(self.narrow(x.mean((2, 3), keepdim=True))))
        return x * torch.sigmoid(gate)


def block(*between):
    """Returns a convolution and its norm, some modules, and a convolution whose input is examined."""
    return nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), *between, nn.Conv2d(8, 8, 1))


class Heads(nn.Module):
    """Reads one value through many modules, since a capture takes a second."""

    def __init__(self, **heads):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.heads = nn.ModuleDict({name: nn.Sequential(head, nn.Conv2d(8, 2, 1)) for name, head in heads.items()})

    def forward(self, x):
        return sum(head(self.stem(x)).flatten(1) for head in self.heads.values())


def measured(module, shape=SHAPE, seed=0):
    """Measures the statistics of all norms on normal inputs, gives them random factors, and returns the module."""
    generator = torch.Generator().manual_seed(seed)
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
        norm.weight.data = 0.5 + torch.rand(norm.num_features, generator=generator)
        norm.bias.data = torch.randn(norm.num_features, generator=generator)
    with torch.no_grad():
        module.train()(torch.randn(512, *shape, generator=generator))
    return module.eval()


def referee(module, shape=SHAPE, kinds=(nn.Conv2d, nn.Linear, nn.ConvTranspose2d)):
    """Returns mean and variance of the inputs of every layer, measured."""
    found, hooks = {}, []
    for name, layer in module.named_modules():
        if isinstance(layer, kinds):
            axes = (0, 2, 3) if not isinstance(layer, nn.Linear) else 0

            def hook(_, inputs, __, name=name, axes=axes):
                found[f"{name}.weight"] = (inputs[0].mean(axes).numpy(), inputs[0].var(axes).numpy())

            hooks.append(layer.register_forward_hook(hook))
    with torch.no_grad():
        module(torch.randn(512, *shape, generator=torch.Generator().manual_seed(9)))
    for one in hooks:
        one.remove()
    return found


FUNCTIONS = (nn.Identity, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.GELU, nn.Sigmoid, nn.LeakyReLU, Shuffle)


def test_moments_pass_functions_and_moved_channels():
    torch.manual_seed(1)
    module = measured(Heads(**{kind.__name__: kind() for kind in FUNCTIONS}))
    derived, true = input_moments(module, SHAPE), referee(module)
    for name in derived:
        assert np.abs(derived[name].mean - true[name][0]).max() < 0.05, name
        assert np.abs(derived[name].variance / true[name][1] - 1).max() < 0.1, name


def test_moments_pass_sums_and_gates():
    torch.manual_seed(1)
    branch = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8))
    module = measured(Heads(residual=nn.Sequential(Residual(branch), nn.ReLU()), gate=nn.Sequential(nn.ReLU(), Gate())))
    derived, true = input_moments(module, SHAPE), referee(module)
    for name in ("heads.residual.1.weight", "heads.gate.1.weight"):
        # Both sides of the sum are functions of one picture here, so its variance is not the sum.
        assert np.corrcoef(derived[name].mean, true[name][0])[0, 1] > 0.95
        assert np.abs(np.log(derived[name].variance / true[name][1])).max() < np.log(3)


def test_a_linear_layer_reads_flattened_channels():
    torch.manual_seed(1)
    module = measured(nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)))
    entry, (mean, _) = input_moments(module, SHAPE)["4.weight"], referee(module)["4.weight"]
    assert np.abs(entry.mean - mean).max() < 0.25
    assert np.unique(entry.mean[:36]).size == 1


def test_groups_and_transposed_convolutions_have_moments_by_input():
    torch.manual_seed(1)
    module = nn.Sequential(
        nn.Conv2d(8, 16, 1, groups=4, bias=False), nn.ConvTranspose2d(16, 6, 2, stride=2), nn.Conv2d(6, 2, 1)
    )
    derived = input_moments(module.eval(), SHAPE)
    assert derived["0.weight"].groups == 4
    assert derived["1.weight"].transposed
    assert [len(derived[name].mean) for name in ("0.weight", "1.weight", "2.weight")] == [8, 16, 6]


def test_norms_that_were_never_trained_say_nothing():
    torch.manual_seed(1)
    module = block(nn.ReLU()).eval()
    assert untrained(module.state_dict()) == ["1"]
    derived = input_moments(module, SHAPE)
    # ReLU of the variance 1 that its scale claims would have .34; the convolution's is much smaller.
    assert derived["3.weight"].variance.max() < 0.3
    assert not derived["0.weight"].measured


def test_the_reason_for_unknown_moments_is_told():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.second(torch.matmul(self.first(x), self.first(x).transpose(1, 2)))

    derived = input_moments(Odd(), (8, 8))
    assert isinstance(derived["first.weight"], Moments)
    assert derived["second.weight"] == "is behind a product of two computed values"


def test_shares_of_a_branch_are_its_fraction_of_the_variance():
    torch.manual_seed(1)
    branch = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8))
    module = measured(block(Residual(branch)))
    stream, inner = module[1].weight.detach() ** 2, branch[1].weight.detach() ** 2
    shares = input_moments(module, SHAPE).paths.shares()
    assert shares["2.branch.0.weight"] == pytest.approx(float(inner.mean() / (inner + stream).mean()), rel=1e-3)
    assert shares["0.weight"] == shares["3.weight"] == 1


def pruned(module, sparsity=0.6, **options):
    """Prunes and corrects a module; returns the model, the names that were corrected, and the reasons."""
    dense = {name: weight.detach().clone() for name, weight in module.named_parameters()}
    moments = input_moments(module, SHAPE)
    options = {"distribution": "lamp", "importance": data_free_importance(module, moments), **options}
    sparsifier = Sparsifier(module, ModelConfig("module", "Small", 2, SHAPE), **options)
    budget = Budget.of_sparsity(sparsity)
    model = sparsifier.apply(sparsifier.active_weights(budget), budget)
    return model, correct_norms(model, dense, moments)


def test_corrected_norms_expect_what_they_get():
    torch.manual_seed(0)
    module = measured(
        nn.Sequential(
            nn.Conv2d(8, 64, 1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Conv2d(64, 64, 1, groups=2, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU6(),
            nn.Conv2d(64, 4, 1),
        )
    )
    norm = module[4]
    before = norm.running_mean.numpy().copy(), norm.running_var.numpy().copy()
    model, corrected = pruned(module)
    assert corrected.names == ["0.weight", "3.weight", "6.weight"]
    assert not corrected.left_alone
    mean, variance = referee(model.module, kinds=(nn.BatchNorm2d,))["4.weight"]
    deviation, after = np.sqrt(variance), (norm.running_mean.numpy(), norm.running_var.numpy())
    new, old = (np.median(np.abs(mean - values[0]) / deviation) for values in (after, before))
    assert new < 0.3 * old
    new, old = (np.median(np.abs(np.log(variance / values[1]))) for values in (after, before))
    assert new < 0.8 * old


def test_without_a_norm_the_bias_takes_the_mean():
    torch.manual_seed(0)
    module = measured(block(nn.ReLU()))
    after = nn.Sequential(module, nn.Conv2d(8, 1, 1))
    mean = referee(after)["1.weight"][0]
    pruned(module)
    assert np.abs(referee(after)["1.weight"][0] - mean).max() < 0.15


def test_a_layer_without_norm_and_bias_is_left_alone():
    torch.manual_seed(0)
    _, corrected = pruned(nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.ReLU(), nn.Conv2d(8, 8, 1)).eval())
    assert corrected.left_alone == {"0.weight": "it has neither a norm nor a bias behind it"}


def test_an_output_without_weights_stays_finite_and_constant():
    torch.manual_seed(0)
    module = measured(block(nn.ReLU()))
    with torch.no_grad():
        module[0].weight[0] *= 1e-6
    model, _ = pruned(module, allow_starved=True)
    assert not model.masks["0.weight"][0].any()
    with torch.no_grad():
        out = model.module[:2](torch.randn(16, *SHAPE))[:, 0]
    assert torch.equal(out, model.module[1].bias[0].expand_as(out))


def test_importance_follows_the_variance_of_inputs():
    torch.manual_seed(0)
    module = measured(block(nn.ReLU()))
    module[1].weight.data[3], module[1].bias.data[3] = 0, -5  # a channel that is always zero after ReLU
    importance = data_free_importance(module, input_moments(module, SHAPE))
    assert not importance["3.weight"][:, 3].any()
    assert importance["3.weight"][:, :3].all()


def test_a_layer_that_is_used_three_times_sees_the_mixture_of_its_inputs():
    class Thrice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
            self.layer = nn.Conv2d(8, 8, 1)

        def forward(self, x):
            return sum(self.layer(norm(x)) for norm in self.norms)

    net = Thrice().eval()
    generator = torch.Generator().manual_seed(0)
    for norm in net.norms:
        norm.running_mean += 1  # as after a training
        norm.weight.data = 0.5 + torch.rand(8, generator=generator)
        norm.bias.data = torch.randn(8, generator=generator)
    found = input_moments(net, SHAPE)["layer.weight"]
    means = torch.stack([norm.bias.detach() for norm in net.norms])
    squares = torch.stack([norm.weight.detach().square() for norm in net.norms])
    np.testing.assert_allclose(found.mean, means.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.variance, squares.mean(0) + means.var(0, unbiased=False), rtol=1e-3)
