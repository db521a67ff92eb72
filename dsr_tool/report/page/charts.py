"""The geometry of four small charts: columns, lines, bars and one stacked bar; the templates turn them into SVG.

Lengths are in percent of the plot, or in a view box that is stretched over it. Text is never scaled, so it is as
readable on a phone as on a desk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dsr_tool.report.page.axes import Axis, Tick, axis, layer_ticks, span_ticks

__all__ = ["Bar", "Columns", "Line", "Lines", "Series", "bars", "columns", "lines"]

_SIDE = 1000
"""Height, and width of lines, of a view box; whole numbers in it are finer than any screen."""
_COLUMN_WIDTH = 10
"""Width of a column in its view box, with the gap to the next one."""
_CROWDED = 90
"""Number of columns above which they are drawn without gaps."""
_LABEL_GAP = 9.0
"""Height of a line of text in percent of the plot."""
_MIN_PIECE = 4
"""Smallest height of a piece of a column, so that a small share stays visible."""


@dataclass(frozen=True)
class Series:
    """One series of a chart.

    Attributes:
        name: name in the legend or at the end of the line.
        style: CSS class of its color.
        values: one value for each place on the x-axis.
    """

    name: str
    style: str
    values: Sequence[float]


@dataclass(frozen=True)
class Column:
    """One stacked column.

    Attributes:
        title: text that is shown when the reader points at it.
        middle: its middle on the x-axis of the view box.
        pieces: (CSS class, top, bottom) of each piece in the view box.
    """

    title: str
    middle: int
    pieces: tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class Columns:
    """Stacked columns side by side, and a stepped line across them.

    Attributes:
        width: width of the view box.
        crowded: whether the columns have no gaps, because there are many.
        axis: vertical scale.
        columns: the columns from left to right.
        step: SVG path of the stepped line; empty without one.
        ticks: labels below, for a phone.
        wide_ticks: labels below, for a wide window.
        of_layers: whether each column is a layer.
        kind: name of the template that draws it.
    """

    width: int
    crowded: bool
    axis: Axis
    columns: tuple[Column, ...]
    step: str
    ticks: tuple[Tick, ...]
    wide_ticks: tuple[Tick, ...]
    of_layers: bool
    kind: str = "columns"


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


@dataclass(frozen=True)
class Bar:
    """A bar, or a piece of a stacked bar.

    Attributes:
        label: what it stands for.
        text: its amount as text.
        style: CSS class of its color.
        start: distance from the left in percent of the plot.
        length: length in percent of the plot.
    """

    label: str
    text: str
    style: str
    start: float
    length: float


def columns(
    names: Sequence[str],
    series: Sequence[Series],
    label: Callable[[float], str],
    titles: Sequence[str],
    *,
    step: Sequence[float] = (),
    ticks: Sequence[Tick] | None = None,
) -> Columns:
    """Returns one column for each name, with the series stacked from the bottom.

    Args:
        names: dotted names of layers; neighbors with a common prefix share a label below.
        series: the series, the lowest first.
        label: function from a value on the y-axis to its text.
        titles: text of each column that is shown when the reader points at it.
        step: values of a stepped line across the columns.
        ticks: labels below, if the columns are not layers.
    """
    sums = [sum(values) for values in zip(*(one.values for one in series), strict=True)]
    scale = axis(0, max([*sums, *step], default=0), label)
    stacks = tuple(
        Column(
            title,
            i * _COLUMN_WIDTH + _COLUMN_WIDTH // 2,
            _pieces([(one.style, one.values[i]) for one in series], scale),
        )
        for i, title in enumerate(titles)
    )
    path = "".join(f"M{i * _COLUMN_WIDTH + 1} {_y(value, scale)}h{_COLUMN_WIDTH - 2}" for i, value in enumerate(step))
    narrow, wide = layer_ticks(names) if ticks is None else (tuple(ticks), tuple(ticks))
    return Columns(
        width=max(len(names), 1) * _COLUMN_WIDTH,
        crowded=len(names) > _CROWDED,
        axis=scale,
        columns=stacks,
        step=path,
        ticks=narrow,
        wide_ticks=wide,
        of_layers=ticks is None,
    )


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
    scale = axis(min(finite, default=0), max(finite, default=1), label, logarithmic=logarithmic)
    drawn = [one for one in series if any(map(math.isfinite, one.values))]
    # Labels stand at the last finite value: a loss may end as NaN.
    ends = {one.name: max((x, y) for x, y in zip(places, one.values, strict=True) if math.isfinite(y)) for one in drawn}
    label_at = _spread_labels({name: scale.at(value) for name, (_, value) in ends.items()})
    low, high = span
    drawn_lines = tuple(
        Line(
            one.style,
            _path(places, one.values, scale, low, high),
            f"{one.name} {label(ends[one.name][1])}".strip(),
            _x(ends[one.name][0], low, high) / 10,
            label_at[one.name],
        )
        for one in drawn
    )
    return Lines(scale, drawn_lines, tuple(span_ticks(low, high)))


def bars(entries: Sequence[tuple[str, str, str, float]], *, stacked: bool = False) -> list[Bar]:
    """Returns bars that all start at the left, or, if `stacked`, the pieces of one bar.

    Args:
        entries: (label, text, CSS class, value) of each bar or piece.
        stacked: whether the pieces lie end to end in one bar.
    """
    values = [value for *_, value in entries]
    # A chart of zeros still needs a length to divide by.
    whole = (sum(values) if stacked else max(values, default=0)) or 1
    result, start = [], 0.0
    for label, text, style, value in entries:
        result.append(Bar(label, text, style, round(start, 3), round(100 * value / whole, 3)))
        start += 100 * value / whole if stacked else 0
    return result


def _x(place: float, low: float, high: float) -> int:
    """Returns the distance of a place from the left in the view box."""
    return round(_SIDE * (place - low) / (high - low)) if high > low else _SIDE // 2


def _y(value: float, scale: Axis) -> int:
    """Returns the distance of a value from the top in the view box."""
    return round(_SIDE * scale.at(value) / 100)


def _pieces(stack: Sequence[tuple[str, float]], scale: Axis) -> tuple[tuple[str, int, int], ...]:
    """Returns the pieces of a column as (CSS class, top, bottom), from the bottom up; zeros have none."""
    pieces, total = [], 0.0
    for style, value in stack:
        bottom = _y(total, scale)
        total += value
        if value > 0:
            pieces.append((style, min(_y(total, scale), bottom - _MIN_PIECE), bottom))
    return tuple(pieces)


def _path(places: Sequence[float], values: Sequence[float], scale: Axis, low: float, high: float) -> str:
    """Returns the SVG path of a line with gaps at values that are not finite; a single point becomes a dot."""
    path, pen = "", "M"
    for x, value in zip(places, values, strict=True):
        if not math.isfinite(value):
            pen = "M"
            continue
        # A line of no length is drawn as a dot, so a point between two gaps is visible.
        path += f"{pen}{_x(x, low, high)} {_y(value, scale)}" + ("h0" if pen == "M" else "")
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
