"""Rounding by pictures: outputs stay nearer than with each value rounded by itself, masks and everything else stay."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from dsr_tool.calibrate import codes, wide
from dsr_tool.calibrate.codes import GridProblem, fit_codes
from dsr_tool.calibrate.rounding import round_to_grids
from dsr_tool.calibrate.solver import Problem
from dsr_tool.errors import UsageError
from dsr_tool.sparse.sparsify import sparsify
from dsr_tool.sparsity.budget import Budget
from dsr_tool.sparsity.config import ModelConfig
from dsr_tool.sparsity.grid import GridTensor, largest_code
from dsr_tool.sparsity.grid_rounding import balanced, distance, to_grid


class Attention(nn.Module):
    """A packed projection, whose keys and values come from elsewhere, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.attention(x, x * 2, x + 1, need_weights=False)[0].mean(1))


class Partly(nn.Module):
    """A network with a layer that it does not use, and a factor that is no weight of a layer."""

    def __init__(self):
        super().__init__()
        self.first, self.unused, self.last = nn.Linear(8, 8), nn.Linear(4, 4), nn.Linear(8, 3)
        self.factor = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return self.last(torch.relu(nn.functional.linear(self.first(x), self.factor)))


def _convolutions():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True),
        nn.Conv2d(16, 16, 3, groups=16), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2, groups=4), nn.ReLU(),
        nn.ConvTranspose2d(16, 8, 3, stride=2, groups=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(32, 5),
    )  # fmt: skip


NETS = {"convolutions": (_convolutions, (3, 12, 12)), "attention": (Attention, (6, 16))}


def _model(name, sparsity=0.0):
    torch.manual_seed(0)
    build, shape = NETS[name]
    pictures = torch.randn(48, *shape)
    net = build()
    with torch.no_grad():
        net(pictures)  # norm statistics that are not 0 and 1
    return sparsify(net, ModelConfig("module", "Small", 0, shape), Budget(sparsity=sparsity)), pictures


def _distance(model, tensors, pictures):
    other = copy.deepcopy(model.module).eval()
    with torch.no_grad():
        for name, tensor in tensors.items():
            other.get_parameter(name).copy_(torch.from_numpy(tensor.to_dense()))
        return float((other(pictures) - model.module.eval()(pictures)).square().mean())


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_outputs_stay_nearer_than_with_each_value_rounded_by_itself(name, sparsity):
    model, pictures = _model(name, sparsity)
    exact, before = model.tensors(), copy.deepcopy(model.module.state_dict())
    weights = {name for name, spec in model.specs.items() if spec.weight}
    steps = []
    found = round_to_grids(model, 4, pictures, on_progress=lambda done, total: steps.append((done, total)))
    assert found.keys() == weights and steps[-1] == (len(weights), len(weights))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.module.state_dict().items())
    plain = {}
    for weight, tensor in found.items():
        assert isinstance(tensor, GridTensor) and tensor.mask.equals(exact[weight].mask)
        assert np.abs(tensor.codes.astype(int)).max() <= largest_code(4) and distance(tensor, exact[weight]) <= 1
        plain[weight] = balanced(to_grid(exact[weight], 4), exact[weight], 4)
    assert _distance(model, found, pictures) < 0.5 * _distance(model, plain, pictures)


def test_the_same_pictures_give_the_same_bytes_and_a_grid_stays_as_it_is():
    model, pictures = _model("convolutions", 0.5)
    first, second = (round_to_grids(model, 5, pictures) for _ in range(2))
    assert all(second[name].values.tobytes() == tensor.values.tobytes() for name, tensor in first.items())
    with torch.no_grad():
        for name, tensor in first.items():
            model.module.get_parameter(name).copy_(torch.from_numpy(tensor.to_dense()))
    again = round_to_grids(model, 5, pictures)
    assert all(again[name].values.tobytes() == tensor.values.tobytes() for name, tensor in first.items())


def test_a_wide_layer_is_rounded_in_slices(monkeypatch):
    model, pictures = _model("convolutions")
    exact = model.tensors()
    monkeypatch.setattr(wide, "_MOST_BYTES", 0)
    monkeypatch.setattr(wide, "_MOST_COLUMNS", 40)
    found = round_to_grids(model, 4, pictures)
    plain = {name: to_grid(exact[name], 4) for name in found}
    assert _distance(model, found, pictures) < 0.7 * _distance(model, plain, pictures)


def test_weights_that_no_picture_reaches_are_left_to_others_and_infinity_is_refused():
    torch.manual_seed(0)
    net = Partly()
    model = sparsify(net, ModelConfig("module", "Small", 0, (8,)), Budget(sparsity=0))
    assert round_to_grids(model, 8, torch.randn(20, 8)).keys() == {"first.weight", "last.weight"}
    with torch.no_grad():
        net.first.weight[0, 0] = torch.inf
    with pytest.raises(UsageError, match="'first.weight' has values that are not finite numbers"):
        round_to_grids(model, 8, torch.randn(20, 8))


@pytest.mark.parametrize("own", [True, False])
def test_no_code_alone_can_be_better(monkeypatch, own):
    monkeypatch.setattr(codes, "_SWEEPS", 100)
    monkeypatch.setattr(codes, "_COLUMNS", 4)
    torch.manual_seed(0)
    weight, inputs = torch.randn(2, 5, 11), torch.randn(2, 60, 11) + 1
    active = (torch.rand(weight.shape) < 0.8).float()
    weight *= active
    moments = inputs.mT @ inputs / 60
    scales = weight.abs().amax(-1, keepdim=True) / 7 if own else torch.rand(weight.shape) / 4 + 0.2
    problem = Problem(weight, moments, weight @ moments, torch.ones(2, 5), torch.full((2,), 60.0))
    grid = GridProblem(problem, active, scales.clone(), 4)
    nearest = (weight / scales).round().clamp(-7, 7)
    found = fit_codes(grid)
    assert torch.equal(grid.scales, scales) != own

    def errors(values):
        away = values - weight
        damping = codes._DAMPING * moments.diagonal(dim1=1, dim2=2).mean(-1)[:, None]
        return ((away @ moments) * away).sum(-1) + damping * away.square().sum(-1)

    least = errors(found * grid.scales)
    assert (least <= errors(nearest * scales) + 1e-5).all() and least.sum() < 0.7 * errors(nearest * scales).sum()
    low, high = grid.bounds(grid.scales)
    assert ((found >= low) & (found <= high)).all() and not found[active == 0].any()
    for column in range(11):
        for step in (-1, 1):
            other = found.clone()
            other[..., column] = (other[..., column] + step).clamp(low[..., column], high[..., column])
            assert (errors(other * grid.scales) >= least - 1e-5).all()
