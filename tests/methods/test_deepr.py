"""deepr against the rule of its paper, written out one connection at a time."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn, optim

from converters.conversion import convert
from dsr_tool.errors import UsageError
from dsr_tool.methods import DeepR, ReallocationSchedule, attach, make
from dsr_tool.sparse.active import ActiveWeights, Positions, gather
from dsr_tool.train.checkpoint import read_state, write_state

ALWAYS = ReallocationSchedule(((0, 1),), 10**9)

layers = st.lists(
    st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))), min_size=1, max_size=6
)


def network(layers, seed, scale=1.0):
    rng = np.random.default_rng(seed)
    sizes, counts = [n for n, _ in layers], [c for _, c in layers]
    starts = np.cumsum([0, *sizes])
    flat = [np.sort(rng.permutation(n)[:c]) + s for (n, c), s in zip(layers, starts[:-1], strict=True)]
    values = rng.normal(size=sum(counts)) * scale
    return ActiveWeights(
        Positions(tuple(sizes), tuple(counts), torch.from_numpy(np.concatenate(flat))),
        torch.from_numpy(values.astype(np.float32)),
    )


def alone(layers, *args, eta=1.0, **options):
    """Returns the method without an optimizer, for so many layers at a given step size."""
    method = DeepR(*args, **options)
    method._step_sizes = lambda: [eta] * layers
    return method


def moved_on(weights, moved, rng, scale=0.1):
    """Returns the network after an update and one optimizer step that changes every weight a little."""
    values = dict(zip(weights.positions.flat.tolist(), moved.values.tolist(), strict=True))
    for position in moved.dropped.flat.tolist():
        del values[position]
    values |= dict.fromkeys(moved.grown.flat.tolist(), 0.0)
    flat = torch.tensor(sorted(values))
    pushed = torch.tensor([values[p] for p in flat.tolist()]) + torch.from_numpy(rng.normal(size=len(flat)) * scale)
    return ActiveWeights(Positions.of(flat, weights.sizes), pushed.float())


@settings(deadline=None)
@given(layers, st.integers(0, 10**6), st.sampled_from([0.0, 1e-3, 10.0]))
def test_the_total_is_exact_and_no_layer_is_emptied(layers, seed, temperature):
    rng = np.random.default_rng(seed)
    method, generator = alone(len(layers), ALWAYS, 10**9, temperature=temperature), torch.Generator().manual_seed(seed)
    weights, total = network(layers, seed), sum(count for _, count in layers)
    for step in (1, 2, 3):
        moved = method.update(weights, step, generator)
        active, dropped, grown = (set(p.flat.tolist()) for p in (weights.positions, moved.dropped, moved.grown))
        assert dropped <= active and not grown & active and len(dropped) == len(grown)
        weights = moved_on(weights, moved, rng)
        assert sum(weights.counts) == total and min(weights.counts) >= 1


def test_three_rewirings_equal_the_papers_algorithm():
    """Bellec et al., Algorithm 1, with theta = sign * weight and the same noise, over three rewirings."""
    eta, temperature = 0.5, 0.01
    method = alone(2, ALWAYS, 10**9, eta=eta, temperature=temperature)
    weights, generator, rng = network([(200, 60), (100, 40)], 0, 0.2), torch.Generator(), np.random.default_rng(1)
    signs = {p: 1 if v >= 0 else -1 for p, v in zip(weights.positions.flat.tolist(), weights.values, strict=True)}
    for step in (1, 2, 3):
        noise = torch.randn(100, generator=torch.Generator().manual_seed(step)).tolist()
        moved = method.update(weights, step, generator.manual_seed(step))
        theta, gone = {}, []
        for p, w, nu in zip(weights.positions.flat.tolist(), weights.values.tolist(), noise, strict=True):
            theta[p] = signs[p] * w + math.sqrt(2 * eta * temperature) * signs[p] * nu
            if theta[p] < 0:
                gone.append(p)
        assert moved.dropped.flat.tolist() == gone and 5 < len(gone) < 50
        expected = [signs[p] * max(value, 0) for p, value in theta.items()]
        assert moved.values.numpy() == pytest.approx(expected, abs=1e-6)
        # Signs of what grew are random; they are read off the state, eight to the byte.
        state = method.state_dict()
        positive = np.unpackbits(state["signs"].numpy(), count=state["positions"])
        grown = {p: 1 if positive[p] else -1 for p in moved.grown.flat.tolist()}
        assert set(grown.values()) == {1, -1}
        signs = {p: s for p, s in signs.items() if p not in gone} | grown
        weights = moved_on(weights, moved, rng)


def test_growth_is_uniform_over_the_free_positions_of_the_whole_network():
    weights = network([(30, 20), (60, 10)], 3)
    method, generator = alone(2, ALWAYS, 10**9, temperature=50.0), torch.Generator().manual_seed(0)
    hits = np.zeros(90)
    for _ in range(1500):
        hits[method.update(weights, 1, generator).grown.flat.numpy()] += 1
        method.load_state_dict({})
    free = np.ones(90, bool)
    free[weights.positions.flat.numpy()] = False
    assert not hits[~free].any()
    assert stats.chisquare(hits[free]).pvalue > 1e-4


def test_without_noise_only_the_optimizer_flips_signs():
    weights = network([(50, 20)], 0)
    method, generator = alone(1, ALWAYS, 100, temperature=0.0), torch.Generator()
    moved = method.update(weights, 1, generator)
    assert not len(moved.dropped.flat) and torch.equal(moved.values, weights.values)
    flipped = ActiveWeights(weights.positions, weights.values * torch.where(torch.arange(20) % 5 == 0, -1, 1))
    moved = method.update(flipped, 2, generator)
    assert moved.dropped.flat.tolist() == weights.positions.flat[::5].tolist()


def test_flipped_weights_that_cannot_be_pruned_become_zero():
    weights = ActiveWeights(Positions((9, 4), (3, 4), torch.tensor([0, 1, 2, 9, 10, 11, 12])), torch.ones(7))
    method = alone(2, ALWAYS, 100, temperature=0.0)
    method.update(weights, 1, torch.Generator())
    turned = ActiveWeights(weights.positions, torch.tensor([-1.0, -2, -1, -1, 1, 1, 1]))
    moved = method.update(turned, 2, torch.Generator())
    assert moved.dropped.flat.tolist() == [0, 2, 9]
    assert moved.values.tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_the_temperature_changes_at_fractions_of_the_training():
    method = make("deepr", 20_000, temperature="1e-5 0.125:1e-8 0.4:1e-12 0.7:1e-15")
    steps = (1, 2_500, 2_501, 8_000, 8_001, 14_000, 14_001, 20_000)
    found = [method.temperature(step) for step in steps]
    assert found == pytest.approx([1e-5, 1e-5, 1e-8, 1e-8, 1e-12, 1e-12, 1e-15, 1e-15], rel=1e-12)
    assert {make("deepr", 100).temperature(step) for step in (1, 50, 100)} == {1e-7}
    assert method.due(1) and method.due(19_000) and not method.due(19_001)
    assert [step for step in range(1, 10) if make("deepr", 100, every=3, stop=0.06).due(step)] == [3, 6]


def small(seed=0):
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 16, 10))
    return convert(module.to(memory_format=torch.channels_last), sparsity=0.8, positions="random")


def steps(model, optimizer, count, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.randn(4, 8, 6, 6, generator=generator)).square().mean().backward()
        optimizer.step()


def test_values_reach_weights_of_any_memory_format_and_nothing_else():
    model = small()
    optimizer = optim.SGD(model.module.parameters(), lr=1e-9)
    told = []
    attached = attach(model, optimizer, DeepR(ALWAYS, 10**9, temperature=1e-6))
    attached._notify = lambda step, moved: told.append((step, moved))
    before = gather(model)
    steps(model, optimizer, 1, 0)
    after = gather(model)
    (_, moved), kept = told[0], np.isin(before.positions.flat, told[0][1].dropped.flat, invert=True)
    stay = np.isin(after.positions.flat, moved.grown.flat, invert=True)
    assert torch.equal(after.values[stay], moved.values[kept])
    assert not after.values[~stay].any() and not torch.equal(moved.values, before.values)
    model.check()
    assert model.active_weights == sum(before.counts)


def test_a_resumed_run_continues_bit_for_bit(tmp_path):
    runs = []
    for stopped in (False, True):
        model = small()
        optimizer = optim.SGD(model.module.parameters(), lr=0.05, momentum=0.9)
        attached = attach(model, optimizer, make("deepr", 100, temperature=0.01), seed=5)
        steps(model, optimizer, 10, 1)
        if stopped:
            write_state(tmp_path / "state", attached.state_dict())
            attached.remove()
            attached = attach(model, optimizer, make("deepr", 100, temperature=0.01), seed=5)
            attached.load_state_dict(read_state(tmp_path / "state"))
        steps(model, optimizer, 10, 2)
        assert len(attached.last.dropped.flat) > 10
        runs.append([*model.masks.values(), *model.module.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    ("make_optimizer", "eta"),
    [
        (lambda p: optim.SGD(p, lr=0.05), 0.05),
        (lambda p: optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True), 0.5),
        (lambda p: optim.SGD(p, lr=0.05, momentum=0.9, dampening=0.5), 0.25),
        (lambda p: optim.Adam(p, lr=0.05), 0.05),
    ],
)
@pytest.mark.parametrize("storage", ["masked", "compact"])
def test_gradient_and_noise_have_one_step_size(make_optimizer, eta, storage):
    """A constant gradient moves a weight by eta a step in the long run, and the noise is sqrt(2 * eta * T)."""
    torch.manual_seed(0)
    model = convert(nn.Sequential(nn.Linear(400, 300, bias=False)), sparsity=0.5, positions="random")
    model.to_storage(storage)
    optimizer = make_optimizer(model.module.parameters())
    attached = attach(model, optimizer, DeepR(ALWAYS, 10**9, temperature=1e-8))
    before = gather(model).values
    parameter = model.store.values if storage == "compact" else model.weights["0.weight"]
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moved = attached.last.values - before
    assert float(moved.std()) == pytest.approx(math.sqrt(2 * eta * 1e-8), rel=0.02)
    assert attached.method._step_sizes() == pytest.approx([eta])
    optimizer.param_groups[0]["lr"] *= 0.1
    assert attached.method._step_sizes() == pytest.approx([eta / 10])
    if isinstance(optimizer, optim.SGD):
        free = nn.Parameter(torch.zeros(1))
        plain = make_optimizer([free])
        for _ in range(300):
            start = free.item()
            free.grad = torch.ones(1)
            plain.step()
        assert start - free.item() == pytest.approx(eta, rel=1e-3)


@pytest.mark.parametrize("momentum", [1, 1.5])
def test_momentum_without_a_step_size_is_refused_before_the_first_step(momentum):
    model = small()
    optimizer = optim.SGD(model.module.parameters(), lr=0.05, momentum=momentum)
    with pytest.raises(UsageError, match=f"SGD with momentum {momentum} has no step size.*give a momentum below 1"):
        attach(model, optimizer, make("deepr", 100))
    optimizer.param_groups[0]["momentum"] = 0.9
    attached = attach(model, optimizer, make("deepr", 100))  # nothing is left of the first one
    steps(model, optimizer, 1, 0)
    assert attached.step == 1


def test_a_method_that_is_not_attached_says_so():
    with pytest.raises(UsageError, match="deepr takes the step size of an optimizer"):
        DeepR(ALWAYS, 100).update(network([(9, 3)], 0), 1, torch.Generator())


@pytest.mark.parametrize(
    "temperature",
    [-1.0, math.inf, math.nan, "", "hot", "1 0.5", "1 0.5:x", "1 0:2", "1 0.5:1 0.4:2", "1 1:2", "1 0.5:-1"],
)
def test_temperatures_that_are_not_allowed_are_refused(temperature):
    with pytest.raises(UsageError, match=r"deepr temperature .* is not allowed; give a number from 0 on"):
        make("deepr", 100, temperature=temperature)
