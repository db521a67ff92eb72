import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsr_tool.sparsity.granularity import groups, unit_size, whole_units

layers = st.lists(
    st.tuples(st.integers(1, 40), st.sampled_from([1, 4, 9, 25, 49]), st.floats(0, 1)), min_size=1, max_size=8
)


@settings(deadline=None)
@given(layers)
def test_whole_units_leave_less_than_the_smallest_unit_with_room(layers):
    sizes, units = [kernels * unit for kernels, unit, _ in layers], [unit for _, unit, _ in layers]
    counts = [max(round(part * size), unit) for size, unit, (_, _, part) in zip(sizes, units, layers, strict=True)]
    found = whole_units(counts, sizes, units)
    assert all(1 <= n * unit <= size for n, unit, size in zip(found, units, sizes, strict=True))
    left = sum(counts) - sum(n * unit for n, unit in zip(found, units, strict=True))
    # The remainder is less than any unit that still has room.
    room = [unit for n, unit, size in zip(found, units, sizes, strict=True) if n * unit < size]
    assert 0 <= left < min(room, default=1)


def test_single_weights_make_the_total_exact():
    assert whole_units([100, 50, 30], [900, 90, 60], [9, 9, 1]) == [11, 5, 36]


def test_units_of_convolutions_are_kernels_and_of_other_layers_weights():
    assert unit_size((64, 32, 3, 3), "kernel") == 9 and unit_size((64, 32, 3, 3), "weight") == 1
    assert unit_size((10, 20), "kernel") == unit_size((10, 20, 1, 1), "kernel") == 1
    assert unit_size((8, 4, 3, 3, 3), "kernel") == 27
    assert groups([9, 1, 9, 49]) == [[3], [0, 2], [1]]


@pytest.mark.parametrize("units", [[1, 1], [9, 9]])
def test_units_of_one_size_keep_the_proportions(units):
    found = whole_units([90, 180], [900, 900], units)
    assert found == [90 // units[0], 180 // units[0]] and math.isclose(found[1], 2 * found[0])
