"""A plot keeps every point in its frame, at the place of its value."""

import math
import re

from hypothesis import given
from hypothesis import strategies as st

from dsr_tool.report.page.numbers import round_percent
from dsr_tool.report.page.plots import Point, Trace, plot

VALUES = st.floats(0, 1)
PLACES = st.floats(1, 1e9)


def plot_of(points, **options):
    return plot([Trace("a", "m0", points)], round_percent, **options)


@given(st.lists(st.builds(Point, PLACES, VALUES, VALUES), min_size=1, max_size=8))
def test_points_lie_within_the_plot_and_within_their_error_bars(points):
    drawn = plot_of(points, x_label=str)
    dots = drawn.traces[0].dots
    assert len(dots) == len(points)
    for dot in dots:
        x, y = map(int, re.fullmatch(r"M(-?\d+) (-?\d+)h0", dot.path).groups())
        assert 0 <= x <= 1000 and 0 <= y <= 1000
        if dot.bar:
            at, top, bottom = map(int, re.fullmatch(r"M(-?\d+) (-?\d+)V(-?\d+)", dot.bar).groups())
            assert at == x and 0 <= top <= y <= bottom <= 1000
    assert all(0 <= tick.at <= 100 for tick in drawn.ticks) and len(drawn.ticks) <= 5


def test_equal_factors_are_equal_distances_on_a_logarithmic_axis():
    dots = plot_of([Point(10.0**i, 0.5) for i in range(1, 5)], x_label=str).traces[0].dots
    places = [int(dot.path[1:].split()[0]) for dot in dots]
    assert places == [0, 333, 667, 1000]


def test_points_below_the_lowest_value_are_omitted_and_break_the_line():
    drawn = plot_of([Point(1, 0.9), Point(2, 0.1), Point(3, 0.95), Point(4, math.nan)], lowest=0.8)
    trace = drawn.traces[0]
    assert len(trace.dots) == 2 and trace.path.count("M") == 2 and "L" not in trace.path
    assert drawn.axis.low >= 0.8 - 0.05


def test_lines_without_marks_enter_from_the_lower_edge():
    drawn = plot_of([Point(1, 0.1), Point(2, 0.9), Point(3, 0.95)], lowest=0.8, marked=False)
    (first,) = re.findall(r"^M0 (\d+)", drawn.traces[0].path)
    assert drawn.clipped and int(first) > 1000 and drawn.traces[0].dots == ()
    assert [tick.label for tick in drawn.ticks][::2][0] == "1"


def test_a_plot_without_points_is_empty():
    assert plot([], round_percent).traces == () and plot_of([]).traces[0].path == ""
