"""Allocation of weights by cost curves. Brute force over all counts of small layers is the referee."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsr_tool.calibrate.allocation import Curve, Curves
from dsr_tool.errors import UsageError
from dsr_tool.sparsity.distribution import floors
from dsr_tool.sparsity.layers import LayerSpec


def spec(name, *shape):
    return LayerSpec(name, shape, "Linear", "sparse", True, "")


def curves_of(costs_by_count):
    """Returns curves without floors, from the cost at every count from 0 to the size."""
    layers = {
        str(i): Curve(np.arange(len(costs)), np.array(costs, float), (1, len(costs) - 1))
        for i, costs in enumerate(costs_by_count)
    }
    return Curves(layers, allow_starved=True)


@st.composite
def convex(draw):
    """Cost at every count of a layer of 2 to 6 weights: decreasing, convex, 0 at the end."""
    gains = sorted(draw(st.lists(st.integers(0, 50), min_size=2, max_size=6)), reverse=True)
    return [sum(gains[i:]) for i in range(len(gains) + 1)]


layers = st.lists(convex(), min_size=1, max_size=4)


def feasible(costs):
    return itertools.product(*(range(1, len(c)) for c in costs))


@given(layers, st.data())
def test_no_other_counts_of_the_same_total_cost_less(costs, data):
    total = data.draw(st.integers(len(costs), sum(len(c) - 1 for c in costs)))
    counts = curves_of(costs).spread(total)
    assert sum(counts) == total
    best = min(sum(c[n] for c, n in zip(costs, ns, strict=True)) for ns in feasible(costs) if sum(ns) == total)
    assert curves_of(costs).cost(counts) == pytest.approx(best)


@given(layers, st.data())
def test_with_a_limit_on_work_the_cost_is_least_for_the_work_that_is_done(costs, data):
    prices = [data.draw(st.sampled_from([1.0, 2.0, 3.5])) for _ in costs]
    whole = sum(p * (len(c) - 1) for p, c in zip(prices, costs, strict=True))
    limit = data.draw(st.floats(sum(prices), whole + 1))
    counts = curves_of(costs).spread_for(prices, limit)
    work = sum(p * n for p, n in zip(prices, counts, strict=True))
    assert work <= limit
    # Nothing that fits is left out.
    assert all(n == len(c) - 1 or work + p > limit for p, n, c in zip(prices, counts, costs, strict=True))
    # A greedy fill of a knapsack is at most one weight's gain from the best.
    best = min(
        sum(c[n] for c, n in zip(costs, ns, strict=True))
        for ns in feasible(costs)
        if sum(p * n for p, n in zip(prices, ns, strict=True)) <= limit
    )
    largest_gain = max(c[i] - c[i + 1] for c in costs for i in range(len(c) - 1))
    assert curves_of(costs).cost(counts) <= best + largest_gain + 1e-9


shapes = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=8)


@given(shapes, st.randoms(use_true_random=False), st.floats(0, 1))
def test_counts_sum_to_the_total_within_floors_and_sizes(shapes, random, position):
    densities = [0.1, 0.3, 0.7]
    curves = Curves(
        {
            str(i): Curve.of(spec(str(i), *shape), densities, [random.uniform(0, 5) for _ in densities])
            for i, shape in enumerate(shapes)
        }
    )
    sizes = [math.prod(shape) for shape in shapes]
    total = len(sizes) + int(position * (sum(sizes) - len(sizes)))
    counts = curves.spread(total)
    assert sum(counts) == total
    assert all(1 <= count <= size for count, size in zip(counts, sizes, strict=True))
    least = floors(total, shapes)
    if sum(least) <= total:
        assert all(count >= floor for count, floor in zip(counts, least, strict=True))


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(-1, 10)), min_size=1, max_size=12))
def test_a_curve_is_convex_decreasing_and_below_its_points(points):
    densities, costs = zip(*points, strict=True)
    curve = Curve.of(spec("a", 10, 20), densities, costs)
    assert (curve.counts[0], curve.counts[-1], curve.costs[-1]) == (0, 200, 0)
    slopes = np.diff(curve.costs) / np.diff(curve.counts)
    assert (slopes <= 0).all() and (np.diff(slopes) >= -1e-12).all()


def test_a_convex_measurement_is_kept_as_it_is():
    curve = Curve.of(spec("a", 10, 10), [0.5, 0.1, 0.2], [0.3, 2.0, 1.0])
    assert [curve.cost(n) for n in (10, 20, 50, 100)] == pytest.approx([2.0, 1.0, 0.3, 0.0])


def test_a_layer_that_costs_nothing_gets_its_floor():
    free, needed = Curve.of(spec("a", 20, 30), [0.1], [0.0]), Curve.of(spec("b", 20, 30), [0.1], [4.0])
    assert Curves({"a": free, "b": needed}).spread(400) == [30, 370]


def test_work_moves_weights_to_the_layer_where_they_are_cheap():
    curve = Curve.of(spec("a", 20, 20), np.linspace(0, 1, 11), (1 - np.linspace(0, 1, 11)) ** 2)
    twice = Curves({"a": curve, "b": curve})
    even = twice.spread_for([1.0, 1.0], 400)
    assert abs(even[0] - even[1]) <= 40  # a segment of the curve
    costly, cheap = twice.spread_for([9.0, 1.0], 2000)
    # The gain per work is equal at the optimum: 1 - density is 9 times as large where a weight costs 9 times as much.
    assert costly / 400 == pytest.approx(0.45, abs=0.05)
    assert cheap / 400 == pytest.approx(0.94, abs=0.05)


def test_a_layer_whose_weights_cost_nothing_stays_full():
    curve = Curve.of(spec("a", 20, 20), [0.1], [1.0])
    assert Curves({"a": curve, "b": curve}).spread_for([0.0, 1.0], 100) == [400, 100]


@pytest.mark.parametrize(("prices", "limit"), [([1.0, 1.0], 1), ([1.0, -1.0], 10), ([1.0, math.nan], 10)])
def test_impossible_work_is_refused(prices, limit):
    curve = Curve.of(spec("a", 20, 20), [0.1], [1.0])
    with pytest.raises(UsageError, match="limit"):
        Curves({"a": curve, "b": curve}).spread_for(prices, limit)


@pytest.mark.parametrize("total", [1, 801])
def test_impossible_totals_are_refused(total):
    curve = Curve.of(spec("a", 20, 20), [0.1], [1.0])
    with pytest.raises(UsageError, match="active weights"):
        Curves({"a": curve, "b": curve}).spread(total)


def test_a_cost_that_is_not_finite_names_its_layer():
    with pytest.raises(UsageError, match="'features.0'.*not finite"):
        Curve.of(spec("features.0", 4, 4), [0.1, 0.2], [1.0, math.nan])
