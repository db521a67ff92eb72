import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsr_tool.core.budget import Budget, apportion
from dsr_tool.errors import UsageError

entries = st.tuples(st.integers(0, 10**6), st.integers(0, 10**5), st.integers(0, 3))


@given(st.lists(entries, min_size=1, max_size=40), st.floats(0, 1))
def test_apportion_is_exact_and_within_bounds(layers, position):
    caps = [max(cap, floor) for _, cap, floor in layers]
    floors = [floor for _, _, floor in layers]
    shares = [share for share, _, _ in layers]
    total = sum(floors) + int(position * (sum(caps) - sum(floors)))
    parts = apportion(total, shares, caps, floors)
    assert sum(parts) == total
    assert all(floor <= part <= cap for floor, part, cap in zip(floors, parts, caps, strict=True))


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=30), st.integers(0, 10**9))
def test_without_bounds_each_part_is_within_one_of_its_share(shares, total):
    parts = apportion(total, shares, [total] * len(shares))
    for part, share in zip(parts, shares, strict=True):
        assert abs(part - total * share / sum(shares)) < 1 + 1e-6 * total


def test_what_a_full_entry_cannot_hold_goes_to_the_others_in_proportion():
    assert apportion(100, [50, 20, 30], [10, 1000, 1000]) == [10, 36, 54]


def test_entries_without_a_share_take_what_is_left():
    assert apportion(10, [1, 0], [4, 20]) == [4, 6]


def test_a_total_out_of_range_is_refused():
    with pytest.raises(UsageError, match="hold 2 to 5"):
        apportion(6, [1, 1], [2, 3], [1, 1])


@pytest.mark.parametrize(
    ("sparsity", "prunable", "active"),
    [
        (0.9, 1000, 100),
        (0.9, 11_678_912, 1_167_891),
        ("0.9", 25_502_912, 2_550_291),
        (0, 7, 7),
        (0.5, 3, 2),
        (0.1, 10, 9),
    ],
)
def test_sparsity_counts_as_written_in_decimal(sparsity, prunable, active):
    assert Budget.of_sparsity(sparsity).active_weights(prunable, 99, 1) == active


@pytest.mark.parametrize("sparsity", [1, -0.1, 1.5, "1/0", "many", math.nan, math.inf])
def test_sparsity_outside_its_range_is_refused(sparsity):
    with pytest.raises(UsageError, match="fraction of zeros"):
        Budget.of_sparsity(sparsity)


def test_a_sparsity_that_empties_layers_says_the_highest_reachable():
    with pytest.raises(UsageError, match=r"highest reachable sparsity is 0\.9\."):
        Budget.of_sparsity(0.95).active_weights(100, 0, 10)


@pytest.mark.parametrize(("text", "parameters"), [("5.1Mparams", 5_100_000), ("300kparams", 300_000), ("7params", 7)])
def test_parameter_budgets(text, parameters):
    assert Budget.parse(text).active_weights(10**9, 3, 1) == parameters - 3


@pytest.mark.parametrize("text", ["12", "1/0", "1.5Xparams", "params", "-3Mparams", "1e3params"])
def test_budgets_that_are_not_understood(text):
    with pytest.raises(UsageError, match="5.1Mparams"):
        Budget.parse(text)


def test_a_parameter_budget_out_of_range_names_the_range():
    with pytest.raises(UsageError, match="from 52 .* to 150"):
        Budget.parse("1kparams").active_weights(100, 50, 2)
