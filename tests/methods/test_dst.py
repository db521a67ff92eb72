"""dst compared with the paper's masked layers, its projection onto the budget, and the errors."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn, optim
from torch.nn.functional import conv2d, cross_entropy, linear

from converters.conversion import convert
from dsr_tool.errors import UsageError
from dsr_tool.methods import DST, ReallocationSchedule, attach, make
from dsr_tool.methods.dst import long_tailed
from dsr_tool.sparsity.budget import Budget


class Step(torch.autograd.Function):
    """The step function with the paper's surrogate derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x >= 0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        slope = torch.where(x.abs() <= 0.4, 2 - 4 * x.abs(), torch.where(x.abs() <= 1, 0.4, 0.0))
        return grad * slope


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3)
        self.hidden = nn.Linear(54, 12)
        self.out = nn.Linear(12, 4)

    def forward(self, x):
        return self.out(torch.relu(self.hidden(torch.relu(self.conv(x)).flatten(1))))


class Masked(nn.Module):
    """Wraps the network with a threshold for every output, and masks inside the forward pass."""

    def __init__(self, net):
        super().__init__()
        self.net = copy.deepcopy(net)
        layers = (self.net.conv, self.net.hidden, self.net.out)
        self.thresholds = nn.ParameterList(layer.weight.new_zeros(len(layer.weight)) for layer in layers)

    def masks(self):
        layers = (self.net.conv, self.net.hidden, self.net.out)
        rows = (t.view(-1, *[1] * (layer.weight.ndim - 1)) for t, layer in zip(self.thresholds, layers, strict=True))
        return [Step.apply(layer.weight.abs() - row) for layer, row in zip(layers, rows, strict=True)]

    def forward(self, x):
        net, (first, second, third) = self.net, self.masks()
        x = torch.relu(conv2d(x, net.conv.weight * first, net.conv.bias)).flatten(1)
        x = torch.relu(linear(x, net.hidden.weight * second, net.hidden.bias))
        return linear(x, net.out.weight * third, net.out.bias)


@pytest.mark.parametrize("kind", [optim.SGD, optim.Adam])
def test_steps_are_those_of_the_papers_masked_layers(kind, monkeypatch):
    monkeypatch.setattr("dsr_tool.methods.dst._LEAST", 0.0)
    torch.manual_seed(0)
    net = Net().double()
    theirs = Masked(net)
    model = convert(net, sparsity=0, input_shape=(2, 5, 5))
    method = DST(ReallocationSchedule(((0, 1),), 1000), final_sparsity=0.5)
    method._control = lambda *_: None
    options = {"momentum": 0.9, "weight_decay": 1e-3} if kind is optim.SGD else {"weight_decay": 1e-3}
    ours = kind(model.module.parameters(), 0.02, **options)
    attach(model, ours, method)
    method._alpha = alpha = 0.005
    weights = kind(theirs.net.parameters(), 0.02, **options)
    thresholds = optim.SGD(theirs.thresholds.parameters(), 0.1, momentum=0.9)
    dense = [theirs.net.conv.weight, theirs.net.hidden.weight, theirs.net.out.weight]
    for _ in range(25):
        x, y = torch.randn(16, 2, 5, 5, dtype=torch.float64), torch.randint(4, (16,))
        for optimizer in (ours, weights, thresholds):
            optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        penalty = sum(torch.exp(-t).sum() for t in theirs.thresholds)
        (cross_entropy(theirs(x), y) + alpha * penalty).backward()
        for optimizer in (ours, weights, thresholds):
            optimizer.step()
        for threshold, weight in zip(theirs.thresholds, dense, strict=True):
            # Ours: no threshold below zero, and none above all weights of its output.
            threshold.data.clamp_(min=0).copy_(torch.minimum(threshold, weight.abs().flatten(1).amax(1)))
        torch.testing.assert_close(method._thresholds, list(theirs.thresholds.parameters()), rtol=1e-9, atol=1e-12)
        for mask, expected in zip(model.masks.values(), theirs.masks(), strict=True):
            assert torch.equal(mask, expected.bool())
        torch.testing.assert_close(method._keeper.dense, dense, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(net.out.bias, theirs.net.out.bias, rtol=1e-9, atol=1e-12)
        model.check()
    assert 0.1 < model.sparsity < 0.95


def test_one_step_equals_a_calculation_by_hand():
    """W = (0.5, -0.2), t = 0.3: the mask keeps the first; slopes at 0.2 and -0.1 are 1.2 and 1.6."""
    model = convert(nn.Linear(2, 1, bias=False).double(), sparsity=0)
    (weight,) = model.module.parameters()
    weight.data.copy_(torch.tensor([[0.5, -0.2]]))
    optimizer = optim.SGD([weight], 1.0)
    method = DST(ReallocationSchedule(((0, 1),), 9), final_sparsity=0.5)
    attach(model, optimizer, method)
    method._thresholds[0].fill_(0.3)
    model.masks["weight"][0, 1] = False
    model.apply_masks()
    method._alpha = 0.0
    weight.grad = torch.tensor([[3.0, 5.0]], dtype=torch.float64)
    optimizer.step()
    # dL/dW = 3 + 3 * 0.5 * 1.2 and 5 * 0.2 * 1.6; dL/dt = -(3 * 0.5 * 1.2 + 5 * -0.2 * 1.6).
    torch.testing.assert_close(method._keeper.dense[0], torch.tensor([[0.5 - 4.8, -0.2 - 1.6]], dtype=torch.float64))
    torch.testing.assert_close(method._thresholds[0], torch.tensor([0.3 + 0.1 * 0.2], dtype=torch.float64))
    assert model.masks["weight"].all() and torch.equal(weight.data, method._keeper.dense[0])


def test_the_surrogate_derivative_equals_the_papers():
    x = torch.tensor([-1.5, -1.0, -0.5, -0.4, -0.1, 0.0, 0.2, 0.4, 0.7, 1.0, 1.1])
    torch.testing.assert_close(long_tailed(x), torch.tensor([0, 0.4, 0.4, 0.4, 1.6, 2, 1.2, 0.4, 0.4, 0.4, 0]))


@settings(max_examples=10, deadline=None)
@given(
    st.floats(0.05, 0.97),
    st.integers(1, 7),
    st.integers(0, 1000),
    st.sampled_from([optim.SGD, optim.Adam, optim.NAdam]),
)
def test_the_count_is_known_at_every_step_and_ends_exactly(sparsity, every, seed, kind):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(13, 17), nn.ReLU(), nn.Linear(17, 9))
    model = convert(net, sparsity=0)
    optimizer = kind(net.parameters(), 0.05)
    method = make("dst", 40, every=every, final_sparsity=sparsity)
    told = []
    attached = attach(model, optimizer, method)
    attached._notify = lambda _, moved: told.append(len(moved.grown.flat) - len(moved.dropped.flat))
    for _ in range(40):
        optimizer.zero_grad()
        net(torch.randn(8, 13)).square().sum().backward()
        optimizer.step()
        model.check()
        assert model.active_weights == model.prunable_weights + sum(told)
        assert all(mask.any() for mask in model.masks.values())
    assert model.active_weights == Budget.of_sparsity(sparsity).active_weights(model.prunable_weights, 0, 2)
    assert method._keeper.dense == [] and attached.last.facts["moved_by_projection"] >= 0
    for name, weight in model.weights.items():
        for value in optimizer.state[weight].values():
            if value.shape == weight.shape:
                assert not value[~model.masks[name]].any()


def blobs(count):
    """Returns ten clouds of points that a small network can classify."""
    centres = torch.randn(10, 20, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(10, (count,))
    return centres[labels] + 0.7 * torch.randn(count, 20), labels


def test_the_density_follows_the_curve():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 60), nn.ReLU(), nn.Linear(60, 40), nn.ReLU(), nn.Linear(40, 10))
    model = convert(net, sparsity=0)
    optimizer = optim.SGD(net.parameters(), 0.05, momentum=0.9)
    attached = attach(model, optimizer, method := make("dst", 400, every=2, final_sparsity=0.9))
    facts = {}
    attached._notify = lambda step, moved: facts.update({step: moved.facts})
    for _ in range(400):
        x, y = blobs(64)
        optimizer.zero_grad()
        cross_entropy(net(x), y).backward()
        optimizer.step()
    for step in range(100, 300, 20):
        assert facts[step]["density"] == pytest.approx(method.target(step), rel=0.5)
    assert facts[300]["density_before_projection"] == pytest.approx(0.1, rel=0.25)
    assert facts[300]["moved_by_projection"] < 0.05 * model.prunable_weights
    x, y = blobs(2000)
    assert (net(x).argmax(1) == y).float().mean() > 0.9


def test_the_projection_keeps_the_largest_beyond_their_thresholds_and_empties_no_layer():
    net = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Linear(1, 4, bias=False))
    model = convert(net, sparsity=0)
    net[0].weight.data.copy_(torch.tensor([[0.9, -0.8, 0.1, 0.2]]))
    net[1].weight.data.copy_(torch.tensor([[0.01], [0.02], [-0.03], [0.0]]))
    method = DST(ReallocationSchedule(((0, 1),), 1), final_sparsity=0.5)
    attach(model, optim.SGD(net.parameters(), 0.0), method)
    method._thresholds[0].fill_(0.85)
    # Beyond thresholds: .05, -.05, -.75, -.65 and .01, .02, .03, .0; with the largest of each layer anyway.
    wanted = method._projected((4, 4))
    assert wanted.tolist() == [True, False, False, False, True, True, True, False]
    method._thresholds[0].fill_(9.0)
    assert method._projected((4, 4)).tolist() == [True, False, False, False, True, True, True, False]


def test_no_output_is_masked_to_less_than_a_quarter_of_the_final_density():
    net = nn.Sequential(nn.Linear(30, 20, bias=False), nn.Linear(20, 30, bias=False))
    model = convert(net, sparsity=0)
    optimizer = optim.SGD(net.parameters(), 0.0)
    attach(model, optimizer, method := DST(ReallocationSchedule(((0, 1),), 9), final_sparsity=0.5))
    method._thresholds[0].copy_(torch.linspace(5, 5.1, 20))
    method._thresholds[1].fill_(0.1)
    net(torch.ones(2, 30)).sum().backward()
    optimizer.step()
    first, second = method._keeper.dense
    assert model.masks["0.weight"].sum(1).tolist() == [4] * 20  # of 30, at a final density of one half
    assert torch.equal(method._thresholds[0], first.abs().sort(1, descending=True).values[:, 3])
    assert torch.equal(model.masks["1.weight"], second.abs() >= method._thresholds[1].view(-1, 1))
    assert method._thresholds[1].amax() == pytest.approx(0.1)


def test_thresholds_do_not_fall_below_zero():
    net = nn.Sequential(nn.Linear(30, 20, bias=False))
    model = convert(net, sparsity=0)
    attach(model, optim.SGD(net.parameters(), 0.1), method := make("dst", 100, final_sparsity=0.5))
    method._thresholds[0].fill_(0.3)
    method._alpha = -1.0
    for _ in range(50):
        net[0].weight.grad = torch.zeros(20, 30)
        method._before_layer_step(0, method._keeper.dense[0], model.masks["0.weight"], net[0].weight.grad)
    assert not method._thresholds[0].any()


def test_a_layer_without_gradient_is_unchanged():
    net = nn.ModuleDict({"used": nn.Linear(9, 8), "unused": nn.Linear(9, 8)})
    model = convert(net, sparsity=0)
    optimizer = optim.SGD(net.parameters(), 0.1)
    attach(model, optimizer, method := DST(ReallocationSchedule(((0, 2),), 8), final_sparsity=0.5))
    method._thresholds[1].fill_(0.1)
    before = net["unused"].weight.detach().clone()
    for _ in range(4):
        optimizer.zero_grad()
        net["used"](torch.randn(4, 9)).square().sum().backward()
        optimizer.step()
    assert torch.equal(method._keeper.dense[1], before)
    assert torch.equal(net["unused"].weight, before * (before.abs() > 0.1))


def test_clipping_sees_the_gradients_of_masked_weights_until_the_projection():
    net = nn.Sequential(nn.Linear(9, 8, bias=False))
    model = convert(net, sparsity=0)
    optimizer = optim.SGD(net.parameters(), 0.1)
    attached = attach(model, optimizer, DST(ReallocationSchedule(((0, 1),), 1), final_sparsity=0.5))
    for inactive in (True, False):
        net[0].weight.grad = torch.ones(8, 9)
        attached.mask_gradients()
        assert bool(net[0].weight.grad.all()) == inactive
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({}, "needs a final sparsity"),
        ({"final_sparsity": 1}, "sparsity 1 is not"),
        ({"target": 1}, "goes with method dsr"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, what):
    with pytest.raises(UsageError, match=what):
        make("dst", 1000, **options)


def test_trainings_and_models_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match="no update until step 75"):
        make("dst", 100, every=90, final_sparsity=0.5)
    sparse = convert(nn.Linear(30, 40), sparsity=0.5)
    with pytest.raises(UsageError, match=r"has 600 of 1,200 weights; convert it with --sparsity 0"):
        attach(sparse, optim.SGD(sparse.module.parameters(), 0.1), make("dst", 100, final_sparsity=0.9))
    model = convert(nn.Linear(30, 40), sparsity=0)
    with pytest.raises(UsageError, match="highest reachable sparsity"):
        attach(model, optim.SGD(model.module.parameters(), 0.1), make("dst", 100, final_sparsity=0.9999))


def test_a_closure_gives_the_same_bits_as_a_backward_pass_before_the_step():
    weights = []
    for inside in (False, True):
        torch.manual_seed(0)
        model = convert(nn.Linear(30, 40), sparsity=0)
        optimizer = optim.SGD(model.module.parameters(), 0.1, momentum=0.9)
        attach(model, optimizer, make("dst", 20, every=2, final_sparsity=0.9))

        def closure(optimizer=optimizer, model=model):
            optimizer.zero_grad()
            loss = (model(torch.ones(2, 30)) - 1).square().sum()
            loss.backward()
            return loss

        for _ in range(12):
            if not inside:
                closure()
            optimizer.step(closure if inside else None)
        weights.append(model.module.weight.detach())
    assert torch.equal(*weights)


def test_optimizers_with_several_gradients_in_a_step_are_refused():
    model = convert(nn.Linear(30, 40), sparsity=0)
    with pytest.raises(UsageError, match="LBFGS takes several"):
        attach(model, optim.LBFGS(model.module.parameters()), make("dst", 100, final_sparsity=0.9))

    class Twice(optim.SGD):
        def step(self, closure):
            with torch.enable_grad():
                closure()
                closure()
            super().step()

    optimizer = Twice(model.module.parameters(), 0.1)
    attach(model, optimizer, make("dst", 100, final_sparsity=0.9))

    def closure():
        optimizer.zero_grad()
        model(torch.ones(1, 30)).sum().backward()

    with pytest.raises(UsageError, match="Twice called its closure twice"):
        optimizer.step(closure)


def test_fused_optimizers_under_a_scaler_are_refused():
    model = convert(nn.Linear(30, 40), sparsity=0)
    optimizer = optim.SGD(model.module.parameters(), 0.1, fused=True)
    attach(model, optimizer, make("dst", 100, final_sparsity=0.9))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(model(torch.ones(1, 30)).sum()).backward()
    with pytest.raises(UsageError, match="train in bf16 or fp32"):
        scaler.step(optimizer)
