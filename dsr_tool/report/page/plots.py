"""The geometry of a plot of lines with points at any place and error bars; `charts` has the other charts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dsr_tool.report.page.axes import Axis, Tick, axis, span_ticks, view_x
from dsr_tool.report.page.lines import line_path

__all__ = ["STYLES", "Dot", "Plot", "Point", "Trace", "Tracing", "plot"]

STYLES = 16
"""Number of lines that can be told apart: eight colors, each solid with dots and dashed with rings.

Their CSS classes are `m0` to `m15`.
"""

_MAX_TICKS = 4
"""Number of labels that fit below a plot on a phone 320 pixels wide."""


@dataclass(frozen=True)
class Point:
    """A point of a line.

    Attributes:
        x: place on the x-axis.
        y: value.
        spread: length of the error bar above and below the value.
        title: text that is shown when the reader points at it.
    """

    x: float
    y: float
    spread: float = 0.0
    title: str = ""


@dataclass(frozen=True)
class Trace:
    """The data of one line.

    Attributes:
        name: name in the legend.
        style: CSS class of its color.
        points: points in any order; the line goes from left to right.
    """

    name: str
    style: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Dot:
    """A marked point of a line: SVG paths of its dot and its error bar in the view box, and its text."""

    path: str
    bar: str
    title: str


@dataclass(frozen=True)
class Tracing:
    """A line as drawn: CSS class, SVG path in a view box of 1000 x 1000, and marked points."""

    style: str
    path: str
    dots: tuple[Dot, ...]


@dataclass(frozen=True)
class Plot:
    """Lines over an x-axis with a scale of its own.

    Attributes:
        axis: vertical scale.
        ticks: labels below.
        traces: the lines.
        clipped: whether lines that leave the plot are cut off at its edge.
        kind: name of the template that draws it.
    """

    axis: Axis
    ticks: tuple[Tick, ...]
    traces: tuple[Tracing, ...]
    clipped: bool = False
    kind: str = "plot"


def plot(
    traces: Sequence[Trace],
    label: Callable[[float], str],
    x_label: Callable[[float], str] | None = None,
    *,
    lowest: float = -math.inf,
    marked: bool = True,
) -> Plot:
    """Returns a plot of all finite points.

    Args:
        traces: the lines.
        label: function from a value on the y-axis to its text.
        x_label: function from a place on the x-axis to its text, for a logarithmic axis; without it, the axis has whole
            numbers.
        lowest: smallest value that the y-axis may begin with; points below are omitted, and the caller should say so.
        marked: whether points have dots and error bars. Lines without them also pass through the points below
            `lowest`, so they enter the plot from its lower edge.
    """
    finite = [point for trace in traces for point in trace.points if math.isfinite(point.y)]
    kept = [point for point in finite if point.y >= lowest]
    # Error bars belong to the plot, so the scale covers their ends.
    # Rounded, because no round number lies between two values that differ in their last bit.
    ends = [round(point.y + side * point.spread, 9) for point in kept for side in (-1, 1)]
    scale = axis(max(min(ends, default=0), lowest), max(ends, default=1), label)
    # Lines without marks may come from the left of the first point that is shown.
    places = [point.x for point in (kept if marked else finite)] or [1.0]
    x_axis = _x_axis(min(places), max(places), x_label)
    least = lowest if marked else -math.inf
    drawn = tuple(_tracing(trace, scale, x_axis, least, marked) for trace in traces)
    return Plot(scale, tuple(x_axis.ticks), drawn, clipped=not marked)


@dataclass(frozen=True)
class _XAxis:
    """The x-axis: ends, scale and labels."""

    low: float
    high: float
    logarithmic: bool
    ticks: Sequence[Tick]

    def at(self, x: float) -> int:
        """Returns the distance of a place from the left in the view box."""
        low, high, x = (math.log(v) if self.logarithmic else v for v in (self.low, self.high, x))
        return view_x(x, low, high)


def _x_axis(low: float, high: float, label: Callable[[float], str] | None) -> _XAxis:
    """Returns a linear x-axis, or a logarithmic one if there is a function for its labels."""
    if label is None:
        return _XAxis(low, high, False, span_ticks(low, high))
    scale = axis(low, high, label, logarithmic=True)
    every = -(-len(scale.ticks) // _MAX_TICKS)
    # The scale is made for the y-axis, whose distances are from the top: from the left they are the rest of 100.
    ticks = [Tick(round(100 - tick.at, 2), tick.label) for tick in scale.ticks[::every]]
    # Labels at the ends stay within the plot, so that none is cut off on a phone.
    edges = {0.0: "start", 100.0: "end"}
    return _XAxis(scale.low, scale.high, True, [Tick(t.at, t.label, edges.get(t.at, "middle")) for t in ticks])


def _tracing(trace: Trace, scale: Axis, x_axis: _XAxis, lowest: float, marked: bool) -> Tracing:
    """Returns a line with gaps at omitted points; a single point becomes a dot."""
    places: list[tuple[int, int] | None] = []
    dots = []
    for point in sorted(trace.points, key=lambda point: point.x):
        if not math.isfinite(point.y) or point.y < lowest:
            places.append(None)
            continue
        x, y = x_axis.at(point.x), _height(point.y, scale)
        places.append((x, y))
        if marked:
            # An error bar ends at the bottom of the plot, which may begin above its lower end.
            top, bottom = (_height(max(point.y + side * point.spread, scale.low), scale) for side in (1, -1))
            dots.append(Dot(f"M{x} {y}h0", f"M{x} {top}V{bottom}" if point.spread else "", point.title))
    return Tracing(trace.style, line_path(places), tuple(dots))


def _height(value: float, scale: Axis) -> int:
    """Returns the distance of a value from the top in the view box."""
    # Rounded like the ends of the scale, so that a value at an end is not outside by its last bit.
    return scale.view_y(round(value, 9))
