"""The last pass of a calibration: what it keeps, what it undoes, and what it leaves alone."""

import math

import pytest
import torch
from torch import nn

from dsr_tool.calibrate.finish import finish
from dsr_tool.errors import UsageError


def convolutional(norm=True):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1, bias=not norm),
        nn.BatchNorm2d(12) if norm else nn.Identity(),
        nn.ReLU(inplace=True),
        nn.Conv2d(12, 12, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(48, 5),
    ).eval()


class Nested(nn.Module):
    """Writes a map and scores in a dict, and a mask of positions that no gradient reaches."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 4, 1)

    def forward(self, x):
        y = self.head(self.body(x).relu())
        return {"out": y, "more": [y.mean((2, 3)), y > 0]}


class Functional(nn.Module):
    """Calls no layer, so that only its output can be compared."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 12))

    def forward(self, x):
        return x.flatten(1)[:, :12] @ self.weight.t()


def pair(make=convolutional, density=0.5):
    """Returns a dense network, the same with the smallest weights of each matrix removed, and the masks."""
    dense, sparse = make(), make()
    sparse.load_state_dict(dense.state_dict())
    masks = {}
    for name, weight in sparse.named_parameters():
        if weight.dim() > 1:
            mask = weight.detach().abs() >= weight.detach().abs().quantile(1 - density)
            weight.data *= mask
            masks[name] = mask
    return dense, sparse, masks


def pictures(count=32, seed=1):
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def distance(ours, theirs, inputs):
    with torch.no_grad():
        return float((ours(inputs) - theirs(inputs)).square().mean())


def state_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("norm", [True, False])
def test_the_network_comes_closer_to_the_dense_one_on_pictures_that_it_never_saw(norm):
    dense, sparse, masks = pair(lambda: convolutional(norm))
    before = distance(sparse, dense, pictures(seed=9))
    finished = finish(sparse, dense, masks, pictures(128), epochs=8, learning_rate=1e-2)
    assert finished.after < finished.before
    assert not finished.undone
    assert distance(sparse, dense, pictures(seed=9)) < 0.7 * before


def test_inactive_weights_stay_exactly_zero_and_others_move():
    dense, sparse, masks = pair()
    start = state_of(sparse)
    finish(sparse, dense, masks, pictures(), epochs=3, learning_rate=1e-2)
    for name, weight in sparse.named_parameters():
        mask = masks.get(name, torch.ones_like(weight, dtype=torch.bool))
        assert torch.count_nonzero(weight[~mask]) == 0
        assert not torch.equal(weight, start[name])
    assert torch.equal(sparse[1].running_mean, start["1.running_mean"])


def test_the_best_of_all_epochs_is_kept():
    dense, sparse, masks = pair()
    finished = finish(sparse, dense, masks, pictures(), epochs=6, learning_rate=3e-2)
    assert finished.after == min(loss for loss in finished.losses if not math.isnan(loss))
    again = finish(sparse, dense, masks, pictures(), epochs=1, learning_rate=1e-9)
    assert again.before == finished.after


@pytest.mark.parametrize("rate", [1e3, 1e30])
def test_a_pass_that_makes_the_network_worse_is_undone(rate):
    dense, sparse, masks = pair()
    start = state_of(sparse)
    finished = finish(sparse, dense, masks, pictures(), learning_rate=rate)
    assert finished.undone
    assert finished.after == finished.before
    assert equal(state_of(sparse), start)


def test_the_same_seed_gives_the_same_bits_and_another_one_does_not():
    results = []
    for seed in (3, 3, 4):
        dense, sparse, masks = pair()
        torch.rand(seed)  # whatever else was drawn before
        finish(sparse, dense, masks, pictures(), epochs=2, learning_rate=1e-2, seed=seed)
        results.append(state_of(sparse))
    assert equal(results[0], results[1])
    assert not equal(results[0], results[2])


@pytest.mark.parametrize(("make", "rate"), [(Nested, 1e-3), (Functional, 5e-2)])
def test_any_outputs_are_brought_closer(make, rate):
    dense, sparse, masks = pair(make)
    finished = finish(sparse, dense, masks, pictures(96), epochs=6, learning_rate=rate)
    assert finished.after < 0.95 * finished.before


def test_outputs_of_other_shapes_leave_the_network_alone():
    class Positions(Functional):
        def forward(self, x):
            return torch.nonzero(super().forward(x) > 0)

    dense, sparse, masks = pair(Positions)
    start = state_of(sparse)
    finished = finish(sparse, dense, masks, pictures())
    assert finished.undone
    assert math.isnan(finished.before)
    assert equal(state_of(sparse), start)


def test_flags_gradients_and_formats_are_given_back():
    dense, sparse, masks = pair()
    sparse.train()
    sparse[1].eval()
    sparse[0].weight.requires_grad_(False)
    gradient = torch.ones_like(sparse[3].weight)
    sparse[3].weight.grad = gradient
    inputs = pictures()
    strides = [p.stride() for p in sparse.parameters()]
    kept_inputs, kept_dense = inputs.clone(), state_of(dense)
    finish(sparse, dense, masks, inputs, epochs=1, learning_rate=1e-2)
    assert sparse.training
    assert not sparse[1].training
    assert not sparse[0].weight.requires_grad
    assert sparse[3].weight.requires_grad
    assert sparse[3].weight.grad is gradient
    assert torch.equal(gradient, torch.ones_like(gradient))
    assert sparse[8].weight.grad is None
    assert [p.stride() for p in sparse.parameters()] == strides
    assert torch.equal(inputs, kept_inputs)
    assert equal(state_of(dense), kept_dense)
    assert all(parameter.grad is None for parameter in dense.parameters())


def test_progress_counts_every_picture_of_every_epoch():
    dense, sparse, masks = pair()
    seen = []
    finish(sparse, dense, masks, pictures(40), epochs=2, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(16, 70), (32, 70), (35, 70), (51, 70), (67, 70), (70, 70)]


def test_pictures_of_its_own_judge_and_are_not_taken_from_the_others():
    dense, sparse, masks = pair()
    seen = []
    finish(sparse, dense, masks, pictures(40), held=pictures(5), epochs=1, on_progress=lambda *done: seen.append(done))
    assert seen[-1] == (40, 40)


def test_a_single_picture_is_enough():
    dense, sparse, masks = pair()
    assert math.isfinite(finish(sparse, dense, masks, pictures(1), epochs=1).after)


def test_what_cannot_be_finished_is_refused():
    dense, sparse, masks = pair()
    with pytest.raises(UsageError, match="no pictures"):
        finish(sparse, dense, masks, pictures(0))
    with pytest.raises(UsageError, match="no pictures"):
        finish(sparse, dense, masks, pictures(), held=pictures(0))
    with pytest.raises(UsageError, match="epochs 0"):
        finish(sparse, dense, masks, pictures(), epochs=0)
    with pytest.raises(UsageError, match="fits no parameter"):
        finish(sparse, dense, {"9.weight": torch.ones(1, dtype=torch.bool)}, pictures())
    sparse[0].weight.data.fill_(1.0)
    with pytest.raises(UsageError, match=r"'0\.weight' has non-zero values outside"):
        finish(sparse, dense, masks, pictures())
