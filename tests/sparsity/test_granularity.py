import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsr_tool.sparsity.distribution import largest, largest_of_each
from dsr_tool.sparsity.granularity import Blocks, Granularity, groups, whole_units

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
    kernel, weight = Granularity("kernel"), Granularity("weight")
    assert kernel.unit((64, 32, 3, 3)) == 9 and weight.unit((64, 32, 3, 3)) == 1
    assert kernel.unit((10, 20)) == kernel.unit((10, 20, 1, 1)) == 1
    assert kernel.unit((8, 4, 3, 3, 3)) == 27
    assert groups([9, 1, 9, 49]) == [[3], [0, 2], [1]]


@pytest.mark.parametrize("units", [[1, 1], [9, 9]])
def test_units_of_one_size_keep_the_proportions(units):
    found = whole_units([90, 180], [900, 900], units)
    assert found == [90 // units[0], 180 // units[0]] and math.isclose(found[1], 2 * found[0])


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.sampled_from([1, 2, 3]))
def test_blocks_are_groups_of_input_channels_and_join_is_the_inverse(outputs, groups, taps, group):
    inputs = groups * group
    array = np.arange(outputs * inputs * taps).reshape(outputs, inputs, taps)
    blocks = Blocks.of(array.shape, group)
    rows = blocks.split(array)
    expected = [
        array[o, i : i + group, t] for o in range(outputs) for t in range(taps) for i in range(0, inputs, group)
    ]
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_array_equal(blocks.join(rows), array.reshape(-1))
    whole = Blocks.of(array.shape, inputs * taps)
    assert [set(row) for row in whole.split(array)] == [set(row) for row in array.reshape(outputs, -1)]
    assert blocks.count == len(rows) and whole.count == outputs


@given(
    st.integers(1, 6).flatmap(
        lambda width: st.tuples(
            st.lists(
                st.lists(st.sampled_from([0.0, 1.0, 2.0, math.inf]), min_size=width, max_size=width),
                min_size=1,
                max_size=5,
            ),
            st.integers(1, width),
        )
    )
)
def test_the_largest_of_each_row_are_those_of_the_row_alone(case):
    rows, active = np.array(case[0], np.float32), case[1]
    chosen = largest_of_each(rows, active)
    for row, mask in zip(rows, chosen, strict=True):
        assert set(np.flatnonzero(mask)) == set(largest(row, active))


def test_steps_are_what_changes_the_count_of_a_layer():
    shape = (10, 8, 3, 3)
    steps = {"weight": 1, "kernel": 9, "fan-in": 10, "2:4": 360, "1:8": 90}
    assert {text: Granularity.parse(text).step(shape) for text in steps} == steps
    assert [str(Granularity.parse(text)) for text in steps] == list(steps)
    assert Granularity.parse("02:04") == Granularity.parse("2:4")
