"""set, rigl and gmp compared with their rules, written out."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn, optim

from converters.conversion import convert
from dsr_tool.errors import UsageError
from dsr_tool.methods import SET, GradualPruning, ReallocationSchedule, RigL, attach, make
from dsr_tool.sparse.active import ActiveWeights, Positions
from dsr_tool.sparsity.budget import Budget

ALWAYS = ReallocationSchedule(((0, 1),), 100)

layers = st.lists(
    st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))), min_size=1, max_size=6
)


def network(layers, seed):
    rng = np.random.default_rng(seed)
    sizes, counts = [n for n, _ in layers], [c for _, c in layers]
    starts = np.cumsum([0, *sizes])
    flat = [np.sort(rng.permutation(n)[:c]) + s for (n, c), s in zip(layers, starts[:-1], strict=True)]
    return ActiveWeights(
        Positions(tuple(sizes), tuple(counts), torch.from_numpy(np.concatenate(flat))),
        torch.from_numpy(rng.normal(size=sum(counts)).astype(np.float32)),
        tuple(torch.from_numpy(rng.normal(size=n).astype(np.float32)) for n in sizes),
    )


def after(weights, moved):
    active = set(weights.positions.flat.tolist())
    dropped, grown = set(moved.dropped.flat.tolist()), set(moved.grown.flat.tolist())
    assert dropped <= active and not grown & active
    return Positions.of(torch.tensor(sorted(active - dropped | grown)), weights.sizes)


@given(layers, st.integers(0, 10**6), st.floats(0.01, 0.99))
def test_set_keeps_every_layer_and_drops_the_smallest(layers, seed, fraction):
    weights = network(layers, seed)
    moved = SET(ALWAYS, drop_fraction=fraction).update(weights, 1, torch.Generator().manual_seed(seed))
    assert after(weights, moved).counts == weights.counts
    assert moved.dropped.counts == moved.grown.counts
    dropped = np.isin(weights.positions.flat, moved.dropped.flat)
    for values, gone in zip(
        weights.values.abs().split(weights.counts), torch.from_numpy(dropped).split(weights.counts), strict=True
    ):
        assert not gone.any() or values[gone].max() <= values[~gone].min()


def rigl_written_out(values, mask, gradient, fraction):
    """Returns the mask of one layer after the authors' update, with full sorts."""
    active = int(mask.sum())
    prune = int(active * fraction)
    ranking = np.argsort(-np.abs(values * mask), kind="stable")
    kept = np.zeros(mask.size, bool)
    kept[ranking[: active - prune]] = True
    score = np.where(kept, np.abs(gradient).min() - 1, np.abs(gradient))
    grown = np.zeros(mask.size, bool)
    grown[np.argsort(-score, kind="stable")[:prune]] = True
    return kept | grown


@given(layers, st.integers(0, 10**6), st.integers(0, 100), st.booleans())
def test_rigl_equals_the_papers_algorithm(layers, seed, step, ties):
    weights = network(layers, seed)
    if ties:  # most gradients are zero, as those of dead inputs are, and the others are few numbers
        weights = replace(weights, gradients=tuple(gradient.mul(2).round() for gradient in weights.gradients))
    method = RigL(ALWAYS, drop_fraction=0.6)
    found = after(weights, method.update(weights, step, torch.Generator()))
    assert found.counts == weights.counts
    fraction = 0.3 * (1 + math.cos(math.pi * step / 100))
    assert method.fraction(step) == pytest.approx(fraction)
    parts = zip(
        weights.positions.per_layer(),
        weights.values.split(weights.counts),
        weights.gradients,
        found.per_layer(),
        strict=True,
    )
    for local, values, gradient, positions in parts:
        dense, mask = np.zeros(len(gradient)), np.zeros(len(gradient), bool)
        dense[local], mask[local] = values, True
        expected = rigl_written_out(dense, mask, gradient.numpy(), method.fraction(step))
        assert np.flatnonzero(expected).tolist() == positions.tolist()


def test_nan_and_infinite_gradients_cost_rigl_no_weights():
    weights = network([(40, 10), (30, 30)], 0)
    for gradient in weights.gradients:
        gradient[::3], gradient[1::3] = torch.nan, torch.inf
    assert after(weights, RigL(ALWAYS).update(weights, 1, torch.Generator())).counts == weights.counts


def test_rigl_sees_the_dense_gradient_on_update_steps_only():
    torch.manual_seed(0)
    model = convert(nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 30)), sparsity=0.8, positions="random")
    optimizer = optim.SGD(model.module.parameters(), lr=0.1, momentum=0.9)
    attached = attach(model, optimizer, RigL(ReallocationSchedule(((0, 3),), 8), drop_fraction=0.5))
    x = torch.randn(16, 30)
    for step in range(1, 8):
        before = {name: mask.clone() for name, mask in model.masks.items()}
        optimizer.zero_grad()
        model.module(x).square().sum().backward()
        gradients = {name: weight.grad.clone() for name, weight in model.weights.items()}
        attached.mask_gradients()
        nn.utils.clip_grad_norm_(model.module.parameters(), 1e-3)
        optimizer.step()
        assert attached._gradients is None
        for name, mask in model.masks.items():
            assert mask.count_nonzero() == before[name].count_nonzero()
            grown = mask & ~before[name]
            assert bool(grown.any()) == (step % 3 == 0)
            if grown.any():
                inactive = gradients[name].abs()[~before[name] & ~mask]
                assert gradients[name].abs()[grown].min() >= inactive.max()
        model.check()


def test_rigl_drops_the_gradients_of_a_step_that_a_scaler_skipped():
    torch.manual_seed(0)
    model = convert(nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 30)), sparsity=0.8, positions="random")
    optimizer = optim.SGD(model.module.parameters(), lr=0.01, momentum=0.9)
    attached = attach(model, optimizer, RigL(ReallocationSchedule(((0, 1),), 8), drop_fraction=0.5))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for factor in (torch.inf, 1.0):
        before = {name: mask.clone() for name, mask in model.masks.items()}
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(16, 30)).square().sum() * factor).backward()
        scaler.unscale_(optimizer)
        gradients = {name: weight.grad.abs() for name, weight in model.weights.items()}
        attached.mask_gradients()
        nn.utils.clip_grad_norm_(model.module.parameters(), 1e-3)
        scaler.step(optimizer)
        scaler.update()
    assert attached.step == 1
    for name, mask in model.masks.items():
        grown = mask & ~before[name]
        assert grown.any()
        assert gradients[name][grown].min() >= gradients[name][~before[name] & ~mask].max()


def test_rigl_grows_by_the_dense_gradients_that_a_closure_computes():
    torch.manual_seed(0)
    model = convert(nn.Sequential(nn.Linear(30, 40)), sparsity=0.8, positions="random")
    optimizer = optim.SGD(model.module.parameters(), lr=0.01)
    attach(model, optimizer, RigL(ReallocationSchedule(((0, 1),), 8), drop_fraction=0.5))
    weight, inputs = model.weights["0.weight"], torch.randn(16, 30)
    for _ in range(2):  # the gradients that are there before the second step are those of the first, masked
        before, seen = model.masks["0.weight"].clone(), []

        def closure(seen=seen):
            optimizer.zero_grad()
            loss = model(inputs).square().sum()
            loss.backward()
            seen.append(weight.grad.abs())
            return loss

        optimizer.step(closure)
        grown = model.masks["0.weight"] & ~before
        assert grown.any()
        assert seen[0][grown].min() >= seen[0][~before & ~model.masks["0.weight"]].max() > 0


@pytest.mark.parametrize("method", [SET(ALWAYS), RigL(ALWAYS), GradualPruning(ALWAYS, final_sparsity=0.5)])
def test_a_layer_without_active_weights_is_unchanged(method):
    weights = ActiveWeights(
        Positions((10, 6), (0, 6), torch.arange(10, 16)), torch.rand(6), (torch.rand(10), torch.rand(6))
    )
    moved = method.update(weights, 1, torch.Generator())
    assert moved.dropped.counts[0] == moved.grown.counts[0] == 0


def test_gmp_follows_the_cubic_and_ends_exactly():
    torch.manual_seed(0)
    model = convert(nn.Sequential(nn.Linear(31, 40), nn.Linear(40, 7)), sparsity=0, positions="random")
    optimizer = optim.SGD(model.module.parameters(), lr=0.01)
    method = make("gmp", 100, final_sparsity="0.9")
    attached = attach(model, optimizer, method)
    total, counts = model.prunable_weights, []
    for _ in range(100):
        optimizer.zero_grad()
        model.module(torch.randn(4, 31)).square().sum().backward()
        optimizer.step()
        counts.append(model.active_weights)
    expected = [round(total * (1 - 0.9 * (1 - (1 - min(step // 3 * 3, 75) / 75) ** 3))) for step in range(1, 101)]
    assert counts == pytest.approx(expected, abs=1)
    assert counts[-1] == counts[74] == Budget.of_sparsity("0.9").active_weights(total, 0, 2)
    assert attached.last.grown.flat.numel() == 0
    for mask in model.masks.values():
        assert mask.float().mean() == pytest.approx(0.1, abs=0.005)


def test_gmp_prunes_the_smallest():
    weights = network([(20, 20), (10, 10)], 3)
    moved = GradualPruning(ReallocationSchedule(((0, 1),), 1), final_sparsity=0.5).update(weights, 1, torch.Generator())
    assert moved.dropped.counts == (10, 5)
    first = weights.values[:20].abs().argsort()[:10].sort().values
    assert moved.dropped.flat[:10].tolist() == first.tolist()


@given(layers, st.integers(0, 10**6))
def test_gmp_with_scope_global_compares_magnitudes_of_all_layers(sizes, seed):
    weights = network([(n + 1, n + 1) for n, _ in sizes], seed)
    method = GradualPruning(ReallocationSchedule(((0, 1),), 1), final_sparsity=0.5, scope="global")
    moved = method.update(weights, 1, torch.Generator())
    left = after(weights, moved)
    assert sum(left.counts) == Budget.of_sparsity(0.5).active_weights(sum(weights.sizes), 0, len(sizes))
    assert min(left.counts) >= 1
    magnitude, dropped = weights.values.abs(), torch.isin(weights.positions.flat, moved.dropped.flat)
    largest = {start + piece.argmax().item() for start, piece in _pieces(magnitude, weights.counts)}
    others = [i for i in range(len(magnitude)) if i not in largest and not dropped[i]]
    assert not dropped.any() or not others or magnitude[dropped].max() <= magnitude[others].min()


def test_gmp_keeps_the_least_of_every_layer_as_the_authors_do_on_mnist():
    """100 weights of the last layer, the rest in equal shares: the counts of LeNet-300-100 at 0.99."""
    sizes = (235_200, 30_000, 1_000)
    torch.manual_seed(0)
    flat = torch.arange(sum(sizes))
    weights = ActiveWeights(Positions(sizes, sizes, flat), torch.randn(len(flat)))
    method = GradualPruning(ReallocationSchedule(((0, 1),), 1), final_sparsity=0.99, least=100)
    method.begin(sizes, sizes)
    moved = method.update(weights, 1, torch.Generator())
    left = [size - lost for size, lost in zip(sizes, moved.dropped.counts, strict=True)]
    assert left == [2272, 290, 100] and sum(left) == 2662
    with pytest.raises(UsageError, match="should end at 2,662 active weights, but least 2000 keeps 5,000"):
        GradualPruning(ReallocationSchedule(((0, 1),), 1), final_sparsity=0.99, least=2000).begin(sizes, sizes)


def test_gmp_with_scope_lamp_keeps_the_best_relative_squares_of_every_layer():
    weights = network([(200, 200), (90, 90)], 5)
    weights = replace(weights, values=weights.values * torch.cat([torch.full((200,), 1e-3), torch.ones(90)]))
    method = GradualPruning(ReallocationSchedule(((0, 1),), 1), final_sparsity=0.5, scope="lamp")
    moved = method.update(weights, 1, torch.Generator())
    scores = []
    for piece in weights.values.double().square().split([200, 90]):
        scores += [(value / piece[piece >= value].sum()).item() for value in piece]
    worst = sorted(range(290), key=scores.__getitem__)[:145]
    assert moved.dropped.flat.tolist() == sorted(worst)
    # A layer whose weights are a thousandth of the other's is not emptied, as it is by magnitudes.
    assert min(moved.dropped.counts) > 20


def _pieces(values, counts):
    return zip(np.cumsum([0, *counts]).tolist(), values.split(counts), strict=False)


def test_gmp_on_a_sparse_model_is_refused_before_the_first_step():
    model = convert(nn.Sequential(nn.Linear(30, 40)), sparsity=0.9, positions="random")
    optimizer = optim.SGD(model.module.parameters(), lr=0.01)
    with pytest.raises(UsageError, match="convert it with --sparsity 0"):
        attach(model, optimizer, make("gmp", 100, final_sparsity=0.5))


@pytest.mark.parametrize(
    ("name", "options", "what"),
    [
        ("set", {"drop_fraction": 0}, "set --drop-fraction 0 is not"),
        ("rigl", {"drop_fraction": 1.5}, "rigl --drop-fraction 1.5 is not"),
        ("gmp", {}, "needs a final sparsity"),
        ("gmp", {"final_sparsity": 1}, "gmp --final-sparsity 1 is not in .0, 1."),
        ("gmp", {"final_sparsity": 0.5, "scope": "globl"}, "did you mean global"),
        ("gmp", {"final_sparsity": 0.5, "least": 0}, "gmp least 0 is not allowed; give a whole number from 1 on"),
        ("gmp", {"final_sparsity": 0.5, "least": float("inf")}, "gmp least inf is not allowed; give a whole number"),
        ("gmp", {"final_sparsity": 0.5, "least": float("nan")}, "gmp least nan is not allowed; give a whole number"),
        ("gmp", {"final_sparsity": 0.5, "least": 2, "scope": "lamp"}, "gmp least 2 goes with scope layer, not"),
        ("static", {"threshold": 1}, "goes with method dsr, not with static"),
        ("dsr", {"drop_fraction": 0.5}, "goes with method set, rigl, snfs, granet or neuron-set, not"),
        ("dsr", {"nonsense": 1}, "is unknown to every method; the options of dsr are target"),
    ],
)
def test_options_that_do_not_fit_are_refused(name, options, what):
    with pytest.raises(UsageError, match=what):
        make(name, 1000, **options)


def test_gmp_without_a_step_to_prune_at_is_refused():
    with pytest.raises(UsageError, match="no step to prune at"):
        make("gmp", 100, every=90, final_sparsity=0.5)


@given(st.integers(1, 300), st.integers(1, 40), st.floats(0, 1))
def test_last_is_the_last_step_that_is_due(total, every, stop):
    for schedule in (
        ReallocationSchedule.spread(total, every=every, stop=stop),
        ReallocationSchedule.steady(total, every=every, stop=stop),
        ReallocationSchedule.times(20, total, stop=stop),
    ):
        assert schedule.last == max((step for step in range(1, total + 1) if schedule.due(step)), default=0)
