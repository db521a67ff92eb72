"""The geometry of a plot of lines whose points lie where they like, with error bars; see `charts` for the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dsr_tool.report.page.axes import Axis, Tick, axis, span_ticks

__all__ = ["STYLES", "Dot", "Plot", "Point", "Trace", "Tracing", "plot"]

STYLES = 16
"""So many lines can be told apart: eight colours, each solid with dots and dashed with rings.

Their CSS classes are `m0` to `m15`.
"""

_SIDE = 1000
_MOST_TICKS = 4  # below a plot on a phone of 320 pixels


@dataclass(frozen=True)
class Point:
    """A value at a place on the x-axis, how far it varies up and down, and what it says when pointed at."""

    x: float
    y: float
    spread: float = 0.0
    title: str = ""


@dataclass(frozen=True)
class Trace:
    """What is drawn as one line: its name, the CSS class of its colour, and its points from left to right."""

    name: str
    style: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Dot:
    """A marked point of a line, in the view box."""

    path: str
    bar: str
    title: str


@dataclass(frozen=True)
class Tracing:
    """A line as drawn: its path in a view box of 1000 x 1000, and its marked points."""

    style: str
    path: str
    dots: tuple[Dot, ...]


@dataclass(frozen=True)
class Plot:
    """Lines over an x-axis of its own scale; `clipped` where they may leave the plot, and are cut off there."""

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
    """A plot of all finite points.

    Args:
        traces: what to draw.
        label: from a value on the y-axis to its text.
        x_label: the same for the x-axis, which is then logarithmic; without it, it has whole numbers from the least.
        lowest: where the y-axis begins at the earliest; what lies below is left out, and the reader is to be told.
        marked: whether points have dots and error bars; lines without come up from below where the axis begins.
    """
    finite = [point for trace in traces for point in trace.points if math.isfinite(point.y)]
    kept = [point for point in finite if point.y >= lowest]
    # Rounded, since no round number lies between values that differ in their last bit.
    ends = [round(point.y + side * point.spread, 9) for point in kept for side in (-1, 1)]
    scale = axis(max(min(ends, default=0), lowest), max(ends, default=1), label)
    places = [point.x for point in (kept if marked else finite)] or [1.0]
    across = _across(min(places), max(places), x_label)
    least = lowest if marked else -math.inf
    made = tuple(_tracing(trace, scale, across, least, marked) for trace in traces)
    return Plot(scale, tuple(across.ticks), made, clipped=not marked)


@dataclass(frozen=True)
class _Across:
    """The x-axis: from a place to thousandths of the width."""

    low: float
    high: float
    logarithmic: bool
    ticks: Sequence[Tick]

    def at(self, x: float) -> int:
        low, high, x = (math.log(v) if self.logarithmic else v for v in (self.low, self.high, x))
        return round(_SIDE * (x - low) / (high - low)) if high > low else _SIDE // 2


def _across(low: float, high: float, label: Callable[[float], str] | None) -> _Across:
    if label is None:
        return _Across(low, high, False, span_ticks(low, high))
    scale = axis(low, high, label, logarithmic=True)
    every = -(-len(scale.ticks) // _MOST_TICKS)
    ticks = [Tick(round(100 - tick.at, 2), tick.label) for tick in scale.ticks[::every]]
    edges = {0.0: "start", 100.0: "end"}
    return _Across(scale.low, scale.high, True, [Tick(t.at, t.label, edges.get(t.at, "middle")) for t in ticks])


def _tracing(trace: Trace, scale: Axis, across: _Across, lowest: float, marked: bool) -> Tracing:
    """A line that is broken where a point is left out; a point by itself is drawn as a dot."""
    path, pen, dots = "", "M", []
    for point in sorted(trace.points, key=lambda point: point.x):
        if not math.isfinite(point.y) or point.y < lowest:
            pen = "M"
            continue
        x, y = across.at(point.x), _height(point.y, scale)
        path += f"{pen}{x} {y}" + ("h0" if pen == "M" else "")
        pen = "L"
        if marked:
            top, bottom = (_height(max(point.y + side * point.spread, scale.low), scale) for side in (1, -1))
            dots.append(Dot(f"M{x} {y}h0", f"M{x} {top}V{bottom}" if point.spread else "", point.title))
    return Tracing(trace.style, path, tuple(dots))


def _height(value: float, scale: Axis) -> int:
    return round(_SIDE * scale.at(round(value, 9)) / 100)
