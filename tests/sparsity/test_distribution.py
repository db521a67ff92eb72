import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsr_tool.errors import UsageError
from dsr_tool.sparsity.distribution import Lamp, by_magnitude, erk, floors, least_total, uniform

shape = st.one_of(
    st.tuples(st.integers(1, 64), st.integers(1, 64)),
    st.tuples(st.integers(1, 32), st.integers(1, 32), st.integers(1, 5), st.integers(1, 5)),
)


@given(st.lists(shape, min_size=1, max_size=12), st.floats(0, 1), st.sampled_from([uniform, erk]))
def test_counts_are_exact_and_fit(shapes, position, spread):
    sizes = [math.prod(s) for s in shapes]
    total = len(shapes) + int(position * (sum(sizes) - len(shapes)))
    counts = spread(total, shapes)
    assert sum(counts) == total
    assert all(1 <= count <= size for count, size in zip(counts, sizes, strict=True))


def test_uniform_gives_every_layer_the_same_density():
    assert uniform(110, [(10, 10), (100, 10)]) == [10, 100]


def test_erk_is_proportional_to_the_sum_of_dimensions():
    # 64+64+3+3 = 134 and 512+512+3+3 = 1030
    counts = erk(11640, [(64, 64, 3, 3), (512, 512, 3, 3)])
    assert counts == [1340, 10300]


def test_erk_gives_the_surplus_of_a_full_layer_to_the_others():
    counts = erk(2000, [(4, 4), (100, 100), (200, 200)])
    assert counts[0] == 16
    assert counts[1:] == [661, 1323]


@given(st.integers(0, 2**32 - 1), st.integers(0, 99))
def test_by_magnitude_keeps_the_largest_of_the_whole_network(seed, position):
    rng = np.random.default_rng(seed)
    weights = [rng.normal(size=rng.integers(1, 60)) for _ in range(5)]
    size = sum(weight.size for weight in weights)
    total = 5 + (size - 5) * position // 99
    counts = by_magnitude(total, weights)
    assert sum(counts) == total
    everything = np.sort(np.abs(np.concatenate(weights)))[::-1]
    expected = [max(1, int((np.abs(weight) >= everything[total - 1]).sum())) for weight in weights]
    # The one that every layer keeps may push out others; without that the referee is exact.
    if sum(expected) == total:
        assert counts == expected


@pytest.mark.parametrize("total", [3, 10, 29, 30])
def test_by_magnitude_is_exact_with_ties(total):
    weights = [np.ones((2, 5), np.float32), np.zeros(10, np.float32), np.ones(10, np.float32)]
    assert sum(by_magnitude(total, weights)) == total
    assert weights[0].max() == 1


def lamp_referee(weights, total):
    """Counts per layer by the definition: squares divided by the sum of those that are not smaller."""
    scores = []
    for i, weight in enumerate(weights):
        squares = np.sort(weight.astype(np.float64).reshape(-1) ** 2)
        scores += [(score, i) for score in squares / np.cumsum(squares[::-1])[::-1]]
    chosen = sorted(scores, reverse=True)[:total]
    return [sum(layer == i for _, layer in chosen) for i in range(len(weights))]


@given(st.integers(0, 2**32 - 1), st.integers(0, 99))
def test_lamp_is_the_definition_of_the_paper(seed, position):
    rng = np.random.default_rng(seed)
    weights = [rng.normal(size=rng.integers(2, 60)) * rng.uniform(0.01, 100) for _ in range(5)]
    size = sum(weight.size for weight in weights)
    total = 5 + (size - 5) * position // 99
    assert Lamp(weights).counts(total, [0] * 5) == lamp_referee(weights, total)


class Read(list):
    """Layers that count how often one is asked for."""

    times = 0

    def __getitem__(self, index):
        self.times += 1
        return super().__getitem__(index)


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 99), min_size=2, max_size=6))
def test_lamp_answers_any_number_of_totals_and_reads_each_layer_three_times_at_most(seed, positions):
    rng = np.random.default_rng(seed)
    weights = Read(rng.normal(size=rng.integers(2, 60)) * rng.integers(0, 3) for _ in range(5))
    size = sum(weight.size for weight in weights)
    lamp, totals = Lamp(weights), [size * position // 99 for position in positions]
    found = [lamp.counts(total, [0] * 5) for total in totals]
    assert weights.times <= 15
    assert found == [Lamp(list(weights)).counts(total, [0] * 5) for total in totals]
    lamp = Lamp(weights := Read(weights))
    lamp.counts(totals[0], [0] * 5)
    assert weights.times == 10


def test_lamp_ignores_the_scale_of_a_layer():
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=(20, 30)), rng.normal(size=(10, 20))]
    scaled = [weights[0] * 1e-30, weights[1] * 1e15]
    assert Lamp(scaled).counts(300, [1, 1]) == Lamp(weights).counts(300, [1, 1])


@given(st.integers(0, 2**32 - 1), st.integers(0, 99))
def test_lamp_is_exact_with_floors_ties_and_zeros(seed, position):
    rng = np.random.default_rng(seed)
    weights = [rng.integers(0, 3, rng.integers(1, 60)).astype(np.float32) for _ in range(4)]
    least = [int(rng.integers(0, weight.size + 1)) for weight in weights]
    total = sum(least) + (sum(weight.size for weight in weights) - sum(least)) * position // 99
    counts = Lamp(weights).counts(total, least)
    assert sum(counts) == total
    assert all(low <= n <= weight.size for low, n, weight in zip(least, counts, weights, strict=True))


def test_lamp_gives_less_to_branches_that_add_little():
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=1000), rng.normal(size=1000)]
    even, shared = (Lamp(weights, shares).counts(800, [1, 1]) for shares in (None, [1, 0.1]))
    assert abs(even[0] - 400) < 40
    assert shared[1] < 0.8 * even[1]


def test_lamp_says_what_layers_hold():
    with pytest.raises(UsageError, match="they hold 5 to 20"):
        Lamp([np.ones(10), np.ones(10)]).counts(4, [3, 2])


@given(st.lists(shape, min_size=1, max_size=12))
def test_the_least_total_holds_the_floors(shapes):
    least = least_total(shapes)
    assert sum(floors(least, shapes)) <= least
    assert sum(floors(least - 1, shapes)) > least - 1
    sizes = [math.prod(s) for s in shapes]
    assert all(floor <= size for floor, size in zip(floors(sum(sizes), shapes), sizes, strict=True))
