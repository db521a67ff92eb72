import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsr_tool.errors import UsageError
from dsr_tool.sparsity.apportion import apportion

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


def test_the_surplus_of_a_full_entry_goes_to_the_others_in_proportion():
    assert apportion(100, [50, 20, 30], [10, 1000, 1000]) == [10, 36, 54]


def test_entries_without_a_share_get_the_rest():
    assert apportion(10, [1, 0], [4, 20]) == [4, 6]


def test_a_total_out_of_range_is_refused():
    with pytest.raises(UsageError, match="hold 2 to 5"):
        apportion(6, [1, 1], [2, 3], [1, 1])
