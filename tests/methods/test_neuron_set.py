"""neuron-set: finding and removing units, growth on living units only, and smaller exports."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn, optim
from torch.nn.functional import cross_entropy, max_pool2d, relu

from converters.conversion import convert
from dsr_tool.errors import UsageError
from dsr_tool.formats.archive import open_archive
from dsr_tool.methods import NeuronSET, ReallocationSchedule, attach, make
from dsr_tool.methods.hidden_units import Hidden, hidden_units
from exporters.export import export

ALWAYS = ReallocationSchedule(((0, 1),), 1000)


class Convolutions(nn.Module):
    """A chain with norm, pool and flattening, a sum that holds its operands together, and two readers of one layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.chain = nn.Conv2d(6, 6, 3, padding=1)
        self.last = nn.Conv2d(6, 4, 3, padding=1)
        self.one = nn.Linear(16, 8)
        self.two = nn.Linear(16, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        x = relu(self.norm(self.stem(x)))
        x = x + self.chain(x)
        x = max_pool2d(relu(self.last(x)), 2).flatten(1)
        return self.out(torch.tanh(self.one(x)) * torch.sigmoid(self.two(x)))


def test_units_are_found_if_only_sparse_layers_compute_and_read_them():
    model = convert(Convolutions(), sparsity=0.3, input_shape=(3, 4, 4))
    names = model.trained
    (found,) = hidden_units(model, names)
    # Operands of the sum and of the product are made by two layers each; the output by one, but it must stay.
    assert (names[found.maker], found.count) == ("last.weight", 4)
    assert [names[layer] for layer, _ in found.readers] == ["one.weight", "two.weight"]
    for _, columns in found.readers:
        assert columns.tolist() == np.repeat(np.arange(4), 4).tolist()


def test_neighbours_of_dense_layers_have_no_hidden_units():
    model = convert(mlp(), sparsity=0.3, input_shape=(12,), keep_dense=["3.weight"])
    assert hidden_units(model, model.trained) == []


def mlp(hidden=(16, 10)):
    return nn.Sequential(
        nn.Linear(12, hidden[0]),
        nn.BatchNorm1d(hidden[0]),
        nn.ReLU(),
        nn.Linear(*hidden, bias=False),
        nn.BatchNorm1d(hidden[1]),
        nn.ReLU(),
        nn.Linear(hidden[1], 5),
    )


def chain(*widths):
    """Returns the hidden units of a chain of linear layers."""
    return [Hidden(i, width, ((i + 1, np.arange(width)),)) for i, width in enumerate(widths[1:-1])]


@pytest.fixture
def known(monkeypatch):
    """Replaces the capture of a graph by known hidden units."""

    def known(*widths):
        monkeypatch.setattr("dsr_tool.methods.neuron_set.hidden_units", lambda *_: chain(*widths))

    return known


def test_the_chain_of_these_tests_equals_a_captured_one():
    model = convert(mlp(), sparsity=0.3, input_shape=(12,))
    for found, expected in zip(hidden_units(model, model.trained), chain(12, 16, 10, 5), strict=True):
        assert (found.maker, found.count) == (expected.maker, expected.count)
        assert [(layer, units.tolist()) for layer, units in found.readers] == [
            (layer, units.tolist()) for layer, units in expected.readers
        ]


def test_one_removal_equals_a_calculation_by_hand(known):
    """Units of strength 3, 0.4, 2.5 and 0: the mean is 1.475, so half of it takes the second and the fourth."""
    known(3, 4, 2)
    net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False))
    model = convert(net, sparsity=0)
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 0, 0], [2.0, 3.0, 0], [0, 0, 1.0], [0, 5.0, 0]]))
        net[1].weight.copy_(torch.tensor([[-1.0, 0.4, 0, 0], [2.0, 0, 2.5, 0]]))
    for name, weight in model.weights.items():
        model.masks[name] = weight != 0
    never = ReallocationSchedule(((0, 1),), 0)
    attached = attach(model, optim.SGD(net.parameters(), 0.0), NeuronSET(never, ALWAYS, unit_threshold=0.5))
    net(torch.ones(1, 3)).sum().backward()
    attached._after_step(True)
    first, second = model.masks["0.weight"], model.masks["1.weight"]
    assert attached.last.facts == {"removed_units": 2.0}
    # Three of the first layer's weights move to the two rows that live, whose old weights stay; one of the second's.
    assert attached.last.dropped.flat.tolist() == [3, 4, 10, 13]
    assert first.sum(1).tolist()[1::2] == [0, 0] and int(first.sum()) == 5 and first[0, 0] and first[2, 2]
    assert second.tolist() == [[True, False, True, False]] * 2
    model.check()


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 12), min_size=3, max_size=5),
    st.floats(0.0, 0.9),
    st.floats(0.05, 0.95),
    st.floats(0.05, 0.95),
    st.integers(0, 1000),
)
def test_counts_stay_exact_and_removed_units_stay_removed(widths, sparsity, fraction, threshold, seed):
    torch.manual_seed(seed)
    net = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in pairwise(widths)))
    if round(sum(p.numel() for p in net.parameters()) * (1 - sparsity)) < len(net):
        return
    # All layers, since a tiny one would stay dense beside larger ones.
    model = convert(net, sparsity=sparsity, positions="random", seed=seed, sparsify_patterns=("*",))
    before = [int(mask.sum()) for mask in model.masks.values()]
    method = NeuronSET(ALWAYS, ALWAYS, drop_fraction=fraction, unit_threshold=threshold)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dsr_tool.methods.neuron_set.hidden_units", lambda *_: chain(*widths))
        attached = attach(model, optimizer := optim.SGD(net.parameters(), 0.01), method, seed=seed)
    removed = [set() for _ in method._hidden]
    for _ in range(8):
        optimizer.zero_grad()
        net(torch.randn(4, widths[0])).square().sum().backward()
        optimizer.step()
        model.check()
        assert [int(mask.sum()) for mask in model.masks.values()] == before
        masks = list(model.masks.values())
        for index, living in enumerate(method._living):
            assert living.any()
            gone = set(np.flatnonzero(~living).tolist())
            assert removed[index] <= gone
            removed[index] = gone
            assert not masks[index][sorted(gone)].any() and not masks[index + 1][:, sorted(gone)].any()
        moved = attached.last
        assert moved.dropped.counts == moved.grown.counts
        assert not set(moved.dropped.flat.tolist()) & set(moved.grown.flat.tolist())


def test_without_room_the_stronger_of_the_weak_units_stay(known):
    known(4, 8, 4)
    net = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Linear(8, 4, bias=False))
    model = convert(net, sparsity=0.25, positions="random")
    net[1].weight.data.copy_(torch.tensor([9.0, 9, 9, 9, 0.4, 0.1, 0.3, 0.2]).expand(4, 8))
    model.apply_masks()
    method = NeuronSET(ALWAYS, ALWAYS)
    attach(model, optimizer := optim.SGD(net.parameters(), 0.0), method)
    strength = method._strength(0)
    net(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    # Each layer has 24 weights, which six of the eight units can hold.
    assert np.flatnonzero(~method._living[0]).tolist() == sorted(np.argsort(strength)[:2])
    assert all(mask.sum() == 24 for mask in model.masks.values())


def test_kernels_and_flattened_channels_are_removed_whole():
    model = convert(Convolutions(), sparsity=0.6, input_shape=(3, 4, 4))
    module = model.module
    method = NeuronSET(ALWAYS, ALWAYS, unit_threshold=0.5)
    before = [int(mask.sum()) for mask in model.masks.values()]
    with torch.no_grad():
        for layer in (module.one, module.two):
            layer.weight[:, 4:8] *= 1e-3
    attach(model, optimizer := optim.SGD(module.parameters(), 0.0), method)
    module(torch.randn(4, 3, 4, 4)).square().sum().backward()
    optimizer.step()
    assert method._living[0].tolist() == [True, False, True, True]
    assert not model.masks["last.weight"][1].any() and model.masks["last.weight"][0].any()
    for name in ("one.weight", "two.weight"):
        assert not model.masks[name][:, 4:8].any()
    assert [int(mask.sum()) for mask in model.masks.values()] == before


def test_a_compact_export_has_no_removed_units(tmp_path):
    torch.manual_seed(0)
    centres = torch.randn(5, 12)
    model = convert(mlp((40, 30)), sparsity=0.8, input_shape=(12,), positions="random")
    optimizer = optim.SGD(model.module.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    attach(model, optimizer, method := make("neuron-set", 200, every=10, unit_threshold=0.7))
    for _ in range(200):
        labels = torch.randint(5, (64,))
        optimizer.zero_grad()
        cross_entropy(model(centres[labels] + 0.3 * torch.randn(64, 12)), labels).backward()
        optimizer.step()
    living = [int(units.sum()) for units in method._living]
    assert living[0] < 35 and living[1] < 25
    # Their norms still shift: a removed unit is a constant other than zero, which nobody reads.
    assert model.module[1].bias.detach()[torch.from_numpy(~method._living[0])].any()
    model.module.eval()
    verification = export(model, tmp_path / "small.dsr", compact=True)
    assert verification.passed and verification.largest_difference <= 1e-5 * verification.scale
    shapes = {name: entry.spec.shape for name, entry in open_archive(tmp_path / "small.dsr").entries.items()}
    assert shapes["0.weight"][0] <= living[0] and shapes["3.weight"][0] <= living[1]
    assert shapes["3.weight"][1] == shapes["0.weight"][0] and shapes["6.weight"][1] == shapes["3.weight"][0]


def test_models_and_options_that_do_not_fit_are_refused(known):
    known(4, 5)
    model = convert(nn.Linear(4, 5), sparsity=0.5)
    with pytest.raises(UsageError, match="finds no hidden units"):
        attach(model, optim.SGD(model.module.parameters(), 0.1), make("neuron-set", 100))
    for options in ({"drop_fraction": 0}, {"unit_threshold": 1.0}):
        with pytest.raises(UsageError, match=f"neuron-set {next(iter(options))}"):
            make("neuron-set", 100, **options)


def test_a_model_whose_input_is_unknown_is_refused():
    model = convert(mlp(), sparsity=0.5)
    with pytest.raises(UsageError, match="input shape"):
        attach(model, optim.SGD(model.module.parameters(), 0.1), make("neuron-set", 100))


def test_a_state_of_other_units_is_refused(known):
    known(4, 8, 4)
    model = convert(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), sparsity=0.5)
    attach(model, optim.SGD(model.module.parameters(), 0.1), method := make("neuron-set", 100))
    method.load_state_dict({"living": [torch.tensor([True, False] * 4)]})
    assert method.state_dict()["living"][0].tolist() == [True, False] * 4
    with pytest.raises(ValueError, match="3 hidden units, expected 8"):
        method.load_state_dict({"living": [torch.ones(3, dtype=torch.bool)]})
