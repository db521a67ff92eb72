"""granet and snfs against their rules, written out one weight at a time."""

import math
from dataclasses import replace
from fractions import Fraction
from itertools import accumulate

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn, optim

from converters.conversion import convert
from dsr_tool.errors import UsageError
from dsr_tool.methods import SNFS, GraNet, Reallocation, ReallocationSchedule, attach, make
from dsr_tool.methods.final_sparsity import active_count
from dsr_tool.sparse.active import ActiveWeights, Positions
from tests.sparse.test_optimizers import Around

layers = st.lists(
    st.integers(8, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(n // 2, n))), min_size=1, max_size=5
)


def network(layers, seed):
    """Returns active weights with distinct magnitudes, gradients and momentum."""
    rng = np.random.default_rng(seed)
    sizes, counts = tuple(n for n, _ in layers), tuple(c for _, c in layers)
    starts = accumulate(sizes, initial=0)
    flat = [np.sort(rng.permutation(n)[:c]) + s for (n, c), s in zip(layers, starts, strict=False)]
    draw = lambda n: torch.from_numpy(rng.normal(size=n).astype(np.float32))  # noqa: E731
    positions = Positions(sizes, counts, torch.from_numpy(np.concatenate(flat)))
    total = sum(counts)
    return ActiveWeights(positions, draw(total), tuple(map(draw, sizes)))


def by_hand(weights, lost, moved, wanted, scores):
    """Returns the positions active in the end: per layer, drop the smallest, then choose by score."""
    active, values = weights.positions.per_layer(), weights.values.split(list(weights.counts))
    starts, end = accumulate(weights.sizes, initial=0), set()
    for i, (start, mine) in enumerate(zip(starts, active, strict=False)):
        order = mine[values[i].abs().argsort()].tolist()
        kept = set(order[lost[i] + moved[i] :])
        others = [p for p in scores[i].abs().argsort(descending=True).tolist() if p not in kept]
        end |= {start + p for p in kept | set(others[: wanted[i]])}
    return end


def after(weights, moved):
    return (set(weights.positions.flat.tolist()) - set(moved.dropped.flat.tolist())) | set(moved.grown.flat.tolist())


@settings(max_examples=60, deadline=None)
@given(layers, st.integers(0, 10**6), st.floats(0.55, 0.9), st.floats(0.05, 0.95), st.integers(1, 100))
def test_granet_prunes_globally_and_moves_by_gradient_in_each_layer(layers, seed, final, share, step):
    weights = network(layers, seed)
    final = round(final, 3)
    if active_count(final, weights.sizes) > sum(weights.counts):
        return
    method = GraNet(ReallocationSchedule(((0, 1),), 100), 100, final_sparsity=final, drop_fraction=share)
    method.begin(weights.sizes, weights.counts)
    first = 1 - Fraction(sum(weights.counts), sum(weights.sizes))
    done = max(1 - Fraction(step, 50), 0)
    sparsity = Fraction(str(final)) + (first - Fraction(str(final))) * done**3
    assert method.final_step == 50 and method.sparsity(step) == sparsity
    total = active_count(sparsity, weights.sizes)
    moved = method.update(weights, step, torch.Generator())
    # The largest weight of a layer stays; of the others, the smallest of the whole network go.
    values = weights.values.split(list(weights.counts))
    ranked = sorted((abs(v), i) for i, part in enumerate(values) for v in sorted(map(abs, part.tolist()))[:-1])
    lost = [0] * len(layers)
    for _, i in ranked[: sum(weights.counts) - total]:
        lost[i] += 1
    share = share / 2 * (1 + math.cos(math.pi * step / 100))
    more = [int(share * (count - gone)) for count, gone in zip(weights.counts, lost, strict=True)]
    expected = by_hand(weights, lost, more, more, weights.gradients)
    assert after(weights, moved) == expected and len(expected) == total
    assert not set(moved.grown.flat.tolist()) & set(weights.positions.flat.tolist())


@settings(max_examples=60, deadline=None)
@given(layers, st.integers(0, 10**6), st.floats(0.05, 0.95), st.integers(1, 99))
def test_snfs_grows_across_layers_by_smoothed_gradients(layers, seed, share, step):
    weights = network(layers, seed)
    method = SNFS(ReallocationSchedule(((0, 1),), 100), drop_fraction=share)
    moved = method.update(weights, step, torch.Generator())
    share = share / 2 * (1 + math.cos(math.pi * step / 100))
    counts = [min(math.ceil(share * count), count - 1) for count in weights.counts]
    grown = [len(after(weights, moved) & set(range(s, s + n))) for s, n in starts(weights)]
    wanted = [end - count + lost for end, count, lost in zip(grown, weights.counts, counts, strict=True)]
    assert sum(wanted) == sum(counts) and min(grown) >= 1
    assert after(weights, moved) == by_hand(weights, counts, [0] * len(counts), wanted, weights.gradients)
    # Layers that are not full have their share of the whole, to within one weight.
    pieces = zip(weights.gradients, weights.positions.per_layer(), strict=True)
    means = [float(gradient[active].abs().mean()) for gradient, active in pieces]
    room = [size - count + lost for size, count, lost in zip(weights.sizes, weights.counts, counts, strict=True)]
    parts = [sum(counts) * mean / sum(means) for mean in means]
    if all(part < most for part, most in zip(parts, room, strict=True)):
        assert all(abs(got - part) < 1 for got, part in zip(wanted, parts, strict=True))


def starts(weights):
    return list(zip(accumulate(weights.sizes, initial=0), weights.sizes, strict=False))


def test_snfs_smooths_gradients_at_every_step_and_moves_at_those_of_its_schedule():
    weights = network([(40, 20), (30, 12)], 0)
    method = SNFS(ReallocationSchedule(((0, 4),), 100), smoothing=0.8)
    expected = [torch.zeros(40), torch.zeros(30)]
    for step in range(1, 5):
        assert method.due(step)
        gradients = tuple(torch.randn(size, generator=torch.Generator().manual_seed(step)) for size in (40, 30))
        moved = method.update(replace(weights, gradients=gradients), step, None)
        expected = [0.8 * old + 0.2 * new for old, new in zip(expected, gradients, strict=True)]
        assert bool(len(moved.grown.flat)) == (step == 4)
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(method._smoothed, expected, strict=True))
    assert method.due(100) and not method.due(101)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("granet", {}, "granet needs a final sparsity"),
        ("granet", {"final_sparsity": 0.9, "drop_fraction": 1}, "granet --drop-fraction 1 is not allowed"),
        ("granet", {"final_sparsity": 0.9, "pruned_at": 0}, "granet pruned-at 0 is not allowed"),
        ("granet", {"final_sparsity": 0.9, "pruned_at": 0.01}, "granet has no update until step 1;"),
        ("snfs", {"drop_fraction": 0}, "snfs --drop-fraction 0 is not allowed"),
        ("snfs", {"smoothing": 1}, "snfs smoothing 1 is not allowed"),
    ],
)
def test_values_out_of_range_are_refused(name, options, message):
    with pytest.raises(UsageError, match=message):
        make(name, 100, **options)


def test_granet_refuses_a_model_that_is_sparser_than_its_end():
    model = convert(nn.Sequential(nn.Linear(30, 40)), sparsity=0.9)
    with pytest.raises(UsageError, match=r"should end at 600 active weights, but the model starts with 120; convert"):
        attach(model, optim.SGD(model.module.parameters(), 0.1), "granet", total_steps=100, final_sparsity=0.5)


class Watch(SNFS):
    """Keeps what it was given."""

    needs_gradients, needs_momentum = False, True
    storages = ("masked", "compact")
    granularities = ("weight", "kernel")

    def update(self, weights, *_):
        self.seen = weights
        return Reallocation.nothing(weights)


def test_an_optimizer_without_momentum_is_refused_if_a_method_reads_it():
    model = convert(nn.Sequential(nn.Linear(30, 40)), sparsity=0.9)
    optimizer = optim.SGD(model.module.parameters(), 0.1)
    attach(model, optimizer, Watch(ReallocationSchedule(((0, 1),), 100)))
    model(torch.ones(2, 30)).sum().backward()
    with pytest.raises(UsageError, match="reads the optimizer's momentum, and this SGD has none; give --momentum 0.9"):
        optimizer.step()


@pytest.mark.parametrize("granularity", ["weight", "kernel"])
@pytest.mark.parametrize("storage", ["masked", "compact", "by layer"])
@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda p: optim.SGD(p, 0.1, momentum=0.9),
        lambda p: optim.Adam(p, 0.01),
        lambda p: Around(optim.SGD(p, 0.1, momentum=0.9)),
    ],
)
def test_momentum_is_that_of_the_optimizer_in_both_storages(granularity, storage, make_optimizer):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.Flatten(), nn.Linear(32, 10, bias=False))
    model = convert(net, sparsity=0.5, positions="random", granularity=granularity, input_shape=(4, 4, 4))
    masks = {name: mask.clone() for name, mask in model.masks.items()}
    model.to_storage("masked" if storage == "masked" else "compact")
    by_layer = [parameter for _, parameter in model.named_parameters()]
    optimizer = make_optimizer(by_layer if storage == "by layer" else model.module.parameters())
    method = Watch(ReallocationSchedule(((0, 1),), 100))
    attach(model, optimizer, method)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(1))).square().sum().backward()
        optimizer.step()
    optimizer = getattr(optimizer, "inner", optimizer)
    key = "exp_avg" if isinstance(optimizer, optim.Adam) else "momentum_buffer"
    if storage == "compact":
        expected = optimizer.state[model.store.values][key]
    elif storage == "by layer":
        expected = torch.cat([optimizer.state[parameter][key] for parameter in by_layer])
    else:
        expected = torch.cat([optimizer.state[model.weights[name]][key][mask] for name, mask in masks.items()])
    if granularity == "kernel":
        kernels = int(masks["0.weight"].sum()) // 9
        expected = torch.cat([expected[: 9 * kernels].abs().reshape(-1, 9).mean(1), expected[9 * kernels :]])
    assert torch.equal(method.seen.momentum, expected) and bool(expected.any())
