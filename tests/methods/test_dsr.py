import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsr_tool.errors import UsageError
from dsr_tool.methods import DSR, METHODS, ReallocationSchedule, make
from dsr_tool.sparse.active import ActiveWeights, Positions

ALWAYS = ReallocationSchedule(((0, 1),), 10**9)

layer = st.one_of(
    st.integers(1, 80).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))),
    st.integers(1, 80).map(lambda n: (n, n)),  # full
    st.integers(1, 80).map(lambda n: (n, 1)),  # nearly empty
)


def network(layers, seed, scale=1.0):
    rng = np.random.default_rng(seed)
    sizes, counts = [n for n, _ in layers], [c for _, c in layers]
    starts = np.cumsum([0, *sizes])
    flat = [np.sort(rng.permutation(n)[:c]) + s for (n, c), s in zip(layers, starts[:-1], strict=True)]
    values = [rng.normal(size=c) * scale * 10 ** rng.uniform(-2, 2) for c in counts]
    return ActiveWeights(
        Positions(tuple(sizes), tuple(counts), torch.from_numpy(np.concatenate(flat))),
        torch.from_numpy(np.concatenate(values).astype(np.float32)),
    )


@settings(max_examples=300)
@given(st.lists(layer, min_size=1, max_size=10), st.integers(0, 10**6), st.sampled_from([1e-6, 0.1, 1.0, 10.0, 1e9]))
def test_the_count_is_exact_and_no_layer_is_emptied_or_overfilled(layers, seed, threshold):
    weights = network(layers, seed)
    method = DSR(ALWAYS, target=0.2, threshold=threshold)
    moved = method.update(weights, 1, torch.Generator().manual_seed(seed))
    assert len(moved.dropped.flat) == len(moved.grown.flat) == sum(moved.grown.counts)
    before = set(weights.positions.flat.tolist())
    dropped, grown = set(moved.dropped.flat.tolist()), set(moved.grown.flat.tolist())
    assert dropped <= before
    assert not grown & before  # so nothing just dropped is grown again
    after = Positions.of(torch.tensor(sorted(before - dropped | grown)), weights.sizes)
    assert sum(after.counts) == sum(weights.counts)
    assert all(1 <= count <= size for count, size in zip(after.counts, weights.sizes, strict=True))
    for lost, had in zip(moved.dropped.counts, weights.counts, strict=True):
        assert lost < had


def test_one_reallocation_equals_the_papers_algorithm_by_hand():
    """Algorithm 1 by hand: two layers of 10 with 4 and 6 active, H = 0.5."""
    values = torch.tensor([1.0, 0.1, -0.2, 2.0, 0.4, -3.0, 1.0, 0.7, -0.1, 5.0])
    flat = torch.tensor([0, 2, 4, 6, 10, 11, 13, 15, 17, 19])
    weights = ActiveWeights(Positions((10, 10), (4, 6), flat), values)
    method = DSR(ALWAYS, target=4, tolerance=0.1, threshold=0.5)
    moved = method.update(weights, 1, torch.Generator().manual_seed(0))
    assert moved.dropped.flat.tolist() == [2, 4, 10, 17]
    # Survivors 2 and 4: four weights are grown 4/6 * 2 = 1.33 and 4/6 * 4 = 2.67.
    assert moved.grown.counts == (1, 3)
    assert moved.facts["threshold"] == 0.5
    assert method.threshold == 0.5  # 4 dropped is within 10 % of 4


@pytest.mark.parametrize(
    ("target", "factor"), [(2, 0.5), (3, 0.5), (3.7, 1), (4, 1), (4.4, 1), (5, 2), (0.2, 0.5), (0.4, 1), (0.9, 2)]
)
def test_the_threshold_is_halved_doubled_or_unchanged_by_the_papers_rule(target, factor):
    values = torch.tensor([1.0, 0.1, -0.2, 2.0, 0.4, -3.0, 1.0, 0.7, -0.1, 5.0])
    weights = ActiveWeights(Positions((100,), (10,), torch.arange(10)), values)
    method = DSR(ALWAYS, target=target, tolerance=0.1, threshold=0.5)
    method.update(weights, 1, torch.Generator())
    assert method.threshold == 0.5 * factor


@pytest.mark.parametrize("target", [0.03, 0.5, 7, 10**9])
def test_an_automatic_threshold_prunes_the_target_at_the_first_update(target):
    weights = network([(400, 200), (300, 100)], 3)
    method = DSR(ALWAYS, target=target, threshold="auto")
    assert method.threshold is None
    moved = method.update(weights, 1, torch.Generator().manual_seed(0))
    ordered = weights.values.abs().sort().values
    wanted = min(round(target * 300) if target < 1 else target, 299)
    assert moved.facts["threshold"] == ordered[wanted].item()
    if wanted < 299:  # if all but one are below it, layers keep their largest
        assert len(moved.dropped.flat) == wanted and moved.facts["share"] == wanted / 300
        assert method.threshold == moved.facts["threshold"]  # exactly N_p were below it


def test_an_automatic_threshold_is_above_zero_whatever_was_just_grown():
    values = torch.tensor([0.0, 0.0, 0.0, 0.3, 0.2, 0.4])
    weights = ActiveWeights(Positions((20,), (6,), torch.arange(6)), values)
    method = DSR(ALWAYS, target=1, threshold="auto")
    moved = method.update(weights, 1, torch.Generator())
    assert moved.facts["threshold"] == pytest.approx(0.3) and moved.dropped.flat.tolist() == [0, 1, 2, 4]
    empty = DSR(ALWAYS, threshold="auto")
    empty.update(ActiveWeights(Positions((20,), (6,), torch.arange(6)), torch.zeros(6)), 1, torch.Generator())
    assert empty.threshold > 0


def test_an_automatic_threshold_is_chosen_once_also_after_a_resumption():
    weights = network([(400, 200)], 0)
    first = DSR(ALWAYS, target=0.1, threshold="auto")
    unmoved, moved = DSR(ALWAYS, threshold="auto"), DSR(ALWAYS, target=0.1, threshold="auto")
    unmoved.load_state_dict(first.state_dict())
    assert unmoved.threshold is None
    first.update(weights, 1, torch.Generator())
    moved.load_state_dict(first.state_dict())
    other = network([(400, 200)], 0, scale=100.0)
    answers = [m.update(other, 2, torch.Generator()).facts["threshold"] for m in (first, moved)]
    assert answers[0] == answers[1] == moved.state_dict()["threshold"] / 2


def test_the_threshold_does_not_grow_if_every_weight_is_below_it():
    weights = network([(50, 10)], 0)
    method = DSR(ALWAYS, target=1000, threshold=1e6)
    for _ in range(5):
        method.update(weights, 1, torch.Generator())
    assert method.threshold == 1e6


def test_a_full_network_is_not_reallocated():
    moved = DSR(ALWAYS, threshold=10.0).update(network([(5, 5), (7, 7)], 0), 1, torch.Generator())
    assert len(moved.dropped.flat) == len(moved.grown.flat) == 0


def test_with_too_few_free_positions_the_smallest_weights_are_pruned():
    values = torch.tensor([0.4, 0.1, 0.3, 0.2, 9.0])
    weights = ActiveWeights(Positions((7,), (5,), torch.arange(5)), values)
    moved = DSR(ALWAYS, threshold=1.0).update(weights, 1, torch.Generator())
    assert moved.dropped.flat.tolist() == [1, 3]
    assert moved.grown.flat.tolist() == [5, 6]


def test_a_layer_that_would_be_empty_keeps_its_largest_weight():
    values = torch.tensor([0.1, -0.3, 0.2, 5.0, 6.0])
    weights = ActiveWeights(Positions((9, 9), (3, 2), torch.tensor([0, 1, 2, 9, 10])), values)
    moved = DSR(ALWAYS, threshold=1.0).update(weights, 1, torch.Generator())
    assert moved.dropped.flat.tolist() == [0, 2]


@pytest.mark.parametrize(
    "option", [{"target": 0}, {"target": -3}, {"tolerance": 1}, {"threshold": 0}, {"threshold": "low"}]
)
def test_values_out_of_range_are_refused(option):
    with pytest.raises(UsageError, match=next(iter(option))):
        DSR(ALWAYS, **option)


def test_the_threshold_is_restored_from_a_state():
    method = DSR(ALWAYS, threshold=0.25)
    other = DSR(ALWAYS)
    other.load_state_dict(method.state_dict())
    assert other.threshold == 0.25


def test_the_papers_schedule_scales_with_the_training():
    schedule = ReallocationSchedule.spread(100_000)
    assert schedule.periods == ((0, 100), (12_500, 200), (40_000, 400), (70_000, 800))
    assert schedule.stop == 95_000
    due = [step for step in range(1, 100_001) if schedule.due(step)]
    assert due[:3] == [100, 200, 300]
    assert [step for step in due if step > 12_500][:2] == [12_700, 12_900]
    assert due[-1] <= 95_000
    assert len(due) == 125 + 137 + 75 + 31


@pytest.mark.parametrize("periods", [(), ((1, 5),), ((0, 5), (0, 6)), ((0, 0),), ((0, 5), (9, 1), (4, 2))])
def test_invalid_periods_are_refused(periods):
    with pytest.raises(UsageError):
        ReallocationSchedule(periods, 10)


def test_unknown_methods_and_lengths_are_refused():
    with pytest.raises(UsageError, match="did you mean static"):
        make("statik", 10)
    with pytest.raises(UsageError, match="total_steps 0"):
        make("dsr", 0)
    assert set(METHODS) >= {"dsr", "static"}
    assert not any(make("static", 100).due(step) for step in range(200))
    assert math.isclose(make("dsr", 100, target=0.3).target, 0.3)
