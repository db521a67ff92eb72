"""The geometry of lines with names at their ends; `plots` has lines with marked points and error bars."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from dsr_tool.report.page.axes import Axis, Tick, axis, span_ticks, view_x
from dsr_tool.report.page.charts import Series

__all__ = ["Line", "Lines", "line_path", "lines"]

_LABEL_GAP = 9.0
"""Height of a line of text in percent of the plot."""


@dataclass(frozen=True)
class Line:
    """One line.

    Attributes:
        style: CSS class of its color.
        path: SVG path in a view box of 1000 x 1000.
        label: text at its end.
        end: distance of its end from the left in percent.
        label_at: distance of the label from the top in percent.
    """

    style: str
    path: str
    label: str
    end: float
    label_at: float


@dataclass(frozen=True)
class Lines:
    """Lines over a common x-axis."""

    axis: Axis
    lines: tuple[Line, ...]
    ticks: tuple[Tick, ...]
    kind: str = "lines"


def lines(
    places: Sequence[float],
    series: Sequence[Series],
    label: Callable[[float], str],
    *,
    span: tuple[float, float],
    logarithmic: bool = False,
) -> Lines:
    """Returns lines through the finite values at `places`, each with its name and last value at its end.

    Args:
        places: places on the x-axis.
        series: series with one value for each place.
        label: function from a value on the y-axis to its text.
        span: ends of the x-axis.
        logarithmic: whether equal distances on the y-axis are equal factors.
    """
    finite = [value for one in series for value in one.values if math.isfinite(value)]
    # Without any value, an axis from 0 to 1 keeps the chart valid.
    scale = axis(min(finite, default=0), max(finite, default=1), label, logarithmic=logarithmic)
    drawn = [one for one in series if any(map(math.isfinite, one.values))]
    # Labels stand at the last finite value: a loss may end as NaN.
    ends = {one.name: max((x, y) for x, y in zip(places, one.values, strict=True) if math.isfinite(y)) for one in drawn}
    label_at = _spread_labels({name: scale.at(value) for name, (_, value) in ends.items()})
    low, high = span
    drawn_lines = tuple(
        Line(
            one.style,
            line_path(
                (view_x(x, low, high), scale.view_y(value)) if math.isfinite(value) else None
                for x, value in zip(places, one.values, strict=True)
            ),
            f"{one.name} {label(ends[one.name][1])}".strip(),
            view_x(ends[one.name][0], low, high) / 10,
            label_at[one.name],
        )
        for one in drawn
    )
    return Lines(scale, drawn_lines, tuple(span_ticks(low, high)))


def line_path(points: Iterable[tuple[int, int] | None]) -> str:
    """Returns the SVG path through points of the view box, with a gap at each None; a single point becomes a dot."""
    path, pen = "", "M"
    for point in points:
        if point is None:
            pen = "M"
            continue
        # A line of no length is drawn as a dot, so a point between two gaps is visible.
        path += f"{pen}{point[0]} {point[1]}" + ("h0" if pen == "M" else "")
        pen = "L"
    return path


def _spread_labels(places: dict[str, float]) -> dict[str, float]:
    """Moves labels up or down until none covers another; the lowest stays above the bottom."""
    result: dict[str, float] = {}
    next_free = 0.0
    for i, (name, place) in enumerate(sorted(places.items(), key=lambda item: item[1])):
        # Room for the labels that follow is kept free at the bottom.
        result[name] = max(min(place, 100 - (len(places) - 1 - i) * _LABEL_GAP), next_free)
        next_free = result[name] + _LABEL_GAP
    return result
