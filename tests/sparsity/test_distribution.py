import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsr_tool.sparsity.distribution import by_magnitude, erk, uniform

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
