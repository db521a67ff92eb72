"""A runner takes the calls that kernels can serve, and changes nothing that the network's user would see."""

import copy
import pickle
from collections import Counter, OrderedDict, namedtuple

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from dsr_tool.runtime.kernels.training import CALLS, available
from dsr_tool.sparse.blocked.runner import Runner

pytestmark = pytest.mark.skipif(not available(), reason="needs the compiled kernels")

Pair = namedtuple("Pair", ["one", "other"])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.c = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8, 5)

    def forward(self, x, scale=1.0):
        return self.fc(self.drop(torch.relu(self.norm(self.c(x))).mean([2, 3]))) * scale


@pytest.fixture
def made(networks):
    dense = Net()
    sparse, store, _ = networks.compact(dense, density=0.4)
    return dense, sparse, store, Runner(sparse, store)


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Watching(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (X.double(), "an argument is torch.float64"),
        (X[:0], "an argument is empty"),
        (X.to("meta"), "torch.float32 on meta"),
        (X.to_sparse(), "layout torch.sparse_coo"),
    ],
)
def test_other_tensors_are_left_to_torch(made, given, reason):
    runner = made[3]
    assert not runner.accepts((given,), {})
    assert reason in runner.note


def test_modes_of_torch_are_left_to_torch(made):
    runner = made[3]
    with torch.autocast("cpu"):
        assert not runner.accepts((X,), {}) and runner.note == "autocast is on"
    with Watching():
        assert not runner.accepts((X,), {}) and "mode of torch" in runner.note
    assert runner.accepts((X,), {}) and not runner.note


def test_a_network_that_cannot_be_traced_is_left_to_torch(networks):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.c = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.c(x) if x.sum() > 0 else x

    sparse, store, _ = networks.compact(Odd())
    runner = Runner(sparse, store)
    assert not runner.accepts((X,), {})
    assert runner.note == "the network cannot be traced: its control flow depends on values"
    with pytest.raises(ValueError, match="cannot run on kernels"):
        runner(X)


def test_weights_of_another_type_and_gradients_of_inactive_weights_are_left_to_torch(made):
    _, sparse, store, runner = made
    store.wants_gradients = True
    assert not runner.accepts((X,), {}) and "inactive" in runner.note
    store.wants_gradients = False
    sparse.fc.bias.data = sparse.fc.bias.data.double()
    assert not runner.accepts((X,), {}) and "fc.bias is torch.float64" in runner.note


def test_the_network_itself_runs_on_kernels_and_counts_its_batches(made):
    _, sparse, _, _ = made
    before = CALLS["dsr_conv"]
    sparse(X).sum().backward()
    assert CALLS["dsr_conv"] > before
    assert sparse.norm.num_batches_tracked == 1


def test_modes_and_settings_are_seen(made):
    dense, sparse, _, runner = made
    first, other = runner(X), runner(X)
    assert not torch.equal(first, other)
    for network in (dense, sparse):
        network.eval()
        network.norm.eps = 0.5
        network.load_state_dict(sparse.state_dict())
    torch.testing.assert_close(runner(X), dense(X))
    sparse.drop.train()
    assert not torch.equal(runner(X), runner(X))


def test_a_module_that_is_replaced_is_seen(made):
    _, sparse, _, runner = made
    sparse.eval()
    sparse.drop = nn.Dropout(0.0)
    before = runner(X)
    sparse.drop = nn.Threshold(100.0, 0.0)
    assert torch.equal(runner(X), sparse.fc.bias.expand(4, 5))
    assert not torch.equal(before, runner(X))


def test_a_hook_is_called(made):
    _, sparse, _, runner = made
    runner(X)
    shapes = []
    handle = sparse.c.register_forward_hook(lambda module, args, result: shapes.append(tuple(result.shape)))
    runner(X).sum().backward()
    assert shapes == [(4, 8, 8, 8)]
    assert runner.coverage.notes == {"c": "it has hooks"}
    handle.remove()
    runner(X)
    assert len(shapes) == 1 and not runner.coverage.notes


def test_another_size_of_image_and_of_batch_needs_no_new_trace(made):
    dense, sparse, _, runner = made
    dense.eval(), sparse.eval()
    for images, size in ((4, 8), (17, 5), (1, 11), (16, 8)):
        x = torch.randn(images, 3, size, size)
        torch.testing.assert_close(runner(x), dense(x))
    assert len(runner._programs) == 1


def test_arguments_by_position_and_by_name(made):
    dense, sparse, _, runner = made
    dense.eval(), sparse.eval()
    torch.testing.assert_close(runner(X, 2.0), dense(X, 2.0))
    torch.testing.assert_close(runner(X, scale=3.0), dense(X, 3.0))
    torch.testing.assert_close(runner(x=X, scale=torch.tensor(0.5)), dense(X, 0.5))
    assert runner.accepts((X,), {}) and torch.equal(runner(X, 2.0), 2 * runner(X))


def test_an_input_is_never_written_to(networks):
    net = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Dropout(0.5, inplace=True))
    sparse, store, _ = networks.compact(net)
    x = X.clone()
    Runner(sparse, store)(x)
    assert torch.equal(x, X)


def test_what_a_module_writes_into_its_input_is_seen_behind_it(networks):
    class Writing(nn.Module):
        def forward(self, x):
            return x.mul_(2.0) if len(x) else x

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.c, self.writing, self.d = nn.Conv2d(3, 4, 1), Writing(), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            y = nn.functional.gelu(self.c(x))
            z = self.writing(y)
            return self.d(y) + z

    found = networks.compare(Outer(), X, density=0.5)
    found.check()
    assert list(found.runner.coverage.notes) == ["writing"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_result_is_the_same_and_has_no_history(made, mode):
    dense, sparse, _, runner = made
    dense.eval(), sparse.eval()
    with mode():
        result = runner(X)
        torch.testing.assert_close(result, dense(X))
    assert not result.requires_grad
    assert runner(X).requires_grad


def test_a_part_without_gradients_gets_none(networks):
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.c, self.d = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            with torch.no_grad():
                y = torch.relu(self.c(x))
            return self.d(y) + y

    net = Frozen()
    sparse, store, _ = networks.compact(net, density=0.5)
    runner = Runner(sparse, store)
    x = X.clone().requires_grad_()
    result = runner(x)
    torch.testing.assert_close(result, net(X))
    result.sum().backward()
    c = store.layers["c.weight"]
    assert not store.values.grad[c.start : c.start + c.count].any() and store.values.grad.any()
    assert x.grad is None and sparse.c.bias.grad is None


def test_rows_that_a_part_without_gradients_made_are_not_used_outside_of_it(networks):
    class Peeking(nn.Module):
        def __init__(self):
            super().__init__()
            self.c = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            y = self.c(x)
            with torch.no_grad():
                size = torch.nn.functional.layer_norm(y, y.shape[1:])
            return torch.nn.functional.layer_norm(y, y.shape[1:]) + size

    networks.compare(Peeking(), X, density=0.5).check()


def test_frozen_parameters_get_no_gradient(made):
    _, sparse, store, runner = made
    sparse.norm.weight.requires_grad_(False)
    sparse.fc.bias.requires_grad_(False)
    runner(X).sum().backward()
    assert sparse.norm.weight.grad is None and sparse.fc.bias.grad is None
    assert sparse.norm.bias.grad is not None and store.values.grad is not None


def test_second_derivatives_are_refused(made):
    runner = made[3]
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(runner(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    "result",
    [
        lambda a, b: (a, b),
        lambda a, b: [a, {"b": b, "n": None}],
        lambda a, b: OrderedDict(out=a, aux=b),
        Pair,
        lambda a, b: a,
        lambda a, b: {"a": a, "size": a.shape[2]},
    ],
)
def test_results_of_any_structure(networks, result):
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.c, self.d = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 2, 1)

        def forward(self, x):
            return result(self.c(x), self.d(x))

    net = Heads()
    sparse, store, _ = networks.compact(net)
    ours, theirs = Runner(sparse, store)(X), net(X)
    assert type(ours) is type(theirs)
    torch.testing.assert_close(ours, theirs)


def test_a_weight_that_two_layers_share(networks):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.c, self.d = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=2, dilation=2)
            self.d.weight = self.c.weight

        def forward(self, x):
            return self.d(torch.tanh(self.c(x)))

    found = networks.compare(Tied(), X, density=0.5)
    found.check()
    assert found.runner.coverage.sparse_on_kernels == 2


def test_copies_and_pickles_start_untraced_and_work(made):
    _, sparse, _, runner = made
    sparse.eval()
    expected = runner(X)
    assert len(runner.plans)
    for other in (copy.deepcopy(runner), pickle.loads(pickle.dumps(runner))):  # noqa: S301 - our own bytes
        assert not len(other.plans) and other.coverage is None
        assert torch.equal(other(X), expected)
        assert other._module is not sparse


def test_positions_that_moved_are_seen(made):
    dense, sparse, store, runner = made
    dense.eval(), sparse.eval()
    runner(X)
    with torch.no_grad():
        layer = store.layers["fc.weight"]
        moved = store.positions.clone()
        moved[layer.start : layer.start + layer.count] = torch.arange(layer.count, dtype=torch.int32)
        store.replace(moved, {name: each.count for name, each in store.layers.items()})
        dense.fc.weight.copy_(store.dense("fc.weight"))
    torch.testing.assert_close(runner(X), dense(X))


def test_stochastic_depth_draws_as_torchvision_does(networks):
    from torchvision.ops import StochasticDepth

    for mode in ("row", "batch"):
        net = nn.Sequential(nn.Conv2d(3, 4, 1), StochasticDepth(0.5, mode))
        sparse, store, _ = networks.compact(net)
        runner = Runner(sparse, store)
        for seed in range(3):
            torch.manual_seed(seed)
            ours = runner(X)
            torch.manual_seed(seed)
            torch.testing.assert_close(ours, net(X))


def test_dropout_zeroes_entries_and_channels_at_its_rate(networks):
    for drop in (nn.Dropout(0.3), nn.Dropout2d(0.3)):
        sparse, store, _ = networks.compact(nn.Sequential(nn.Conv2d(3, 64, 1), drop))
        zeros = Runner(sparse, store)(X.repeat(8, 1, 1, 1)) == 0
        assert 0.25 < zeros.float().mean() < 0.35
        whole = zeros.flatten(2).all(2) | ~zeros.flatten(2).any(2)
        assert whole.all() == isinstance(drop, nn.Dropout2d)


def test_coverage_tells_where_the_steps_ran(made):
    runner = made[3]
    assert runner.coverage is None
    before = Counter(CALLS)
    runner(X)
    coverage = runner.coverage
    assert (coverage.sparse, coverage.sparse_on_kernels, coverage.torch) == (2, 2, ())
    assert str(coverage).startswith("2 of 2 sparse layers on kernels; 0 of 6 steps in torch outside")
    assert (Counter(CALLS) - before)["dsr_conv"] == 2
