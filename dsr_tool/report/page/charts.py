"""The geometry of four small charts: columns, lines, bars and one stacked bar; the templates turn them into SVG.

Everything is in per cent of the plot, or in a view box that is stretched over it: text is never scaled, so that it
stays as readable on a phone as on a desk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dsr_tool.report.page.axes import Axis, Tick, axis, layer_ticks, span_ticks

__all__ = ["Bar", "Columns", "Line", "Lines", "Series", "bars", "columns", "lines"]

_HEIGHT = 1000  # of the view boxes; whole numbers in it are finer than any screen
_WIDE, _CROWDED = 10, 90
_LABEL_GAP = 9.0  # in per cent of the height; a line of text


@dataclass(frozen=True)
class Series:
    """Numbers of one kind: its name, the CSS class that colours it, and one value for each place on the x-axis."""

    name: str
    style: str
    values: Sequence[float]


@dataclass(frozen=True)
class Column:
    """One stacked column: what it says when pointed at, and its pieces as (style, top, bottom) in the view box."""

    title: str
    middle: int
    pieces: tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class Columns:
    """Stacked columns side by side, without gaps where they are many, and a stepped line across them.

    Labels below are those for a phone, and those for a wide window.
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
    """One line: its path in a view box of 1000 x 1000, and the label at its end, in per cent from left and top."""

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
    """A piece of a bar in per cent of its length: where it starts, how long it is, and what it stands for."""

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
    """One column for each name, the series stacked from the bottom.

    Args:
        names: dotted names; neighbours of one prefix share a label below.
        series: what is stacked.
        label: from a value on the y-axis to its text.
        titles: what each column says when pointed at.
        step: values of a line across the columns.
        ticks: labels below, where the columns are not layers.
    """
    sums = [sum(values) for values in zip(*(one.values for one in series), strict=True)]
    scale = axis(0, max([*sums, *step], default=0), label)
    made = tuple(
        Column(title, i * _WIDE + _WIDE // 2, _pieces([(one.style, one.values[i]) for one in series], scale))
        for i, title in enumerate(titles)
    )
    path = "".join(f"M{i * _WIDE + 1} {_y(value, scale)}h{_WIDE - 2}" for i, value in enumerate(step))
    width = max(len(names), 1) * _WIDE
    return Columns(
        width,
        len(names) > _CROWDED,
        scale,
        made,
        path,
        *(layer_ticks(names) if ticks is None else (tuple(ticks), tuple(ticks))),
        ticks is None,
    )


def lines(
    places: Sequence[float],
    series: Sequence[Series],
    label: Callable[[float], str],
    *,
    span: tuple[float, float],
    logarithmic: bool = False,
) -> Lines:
    """Lines through the finite values at `places`, each with its name and last value at its end.

    Args:
        places: on the x-axis.
        series: one value for each place.
        label: from a value on the y-axis to its text.
        span: ends of the x-axis.
        logarithmic: whether equal distances upwards are equal factors.
    """
    finite = [value for one in series for value in one.values if math.isfinite(value)]
    scale = axis(min(finite, default=0), max(finite, default=1), label, logarithmic=logarithmic)
    drawn = [one for one in series if any(map(math.isfinite, one.values))]
    ends = {one.name: max((x, y) for x, y in zip(places, one.values, strict=True) if math.isfinite(y)) for one in drawn}
    at = _apart({name: scale.at(value) for name, (_, value) in ends.items()})
    low, high = span
    made = tuple(
        Line(
            one.style,
            _path(places, one.values, scale, low, high),
            f"{one.name} {label(ends[one.name][1])}".strip(),
            _x(ends[one.name][0], low, high) / 10,
            at[one.name],
        )
        for one in drawn
    )
    return Lines(scale, made, tuple(span_ticks(low, high)))


def bars(entries: Sequence[tuple[str, str, str, float]], *, stacked: bool = False) -> list[Bar]:
    """Bars of (label, text, style, value): each from the left, or `stacked` one behind the other in one."""
    values = [value for *_, value in entries]
    whole = (sum(values) if stacked else max(values, default=0)) or 1
    made, start = [], 0.0
    for label, text, style, value in entries:
        made.append(Bar(label, text, style, round(start, 3), round(100 * value / whole, 3)))
        start += 100 * value / whole if stacked else 0
    return made


def _x(place: float, low: float, high: float) -> int:
    return round(_HEIGHT * (place - low) / (high - low)) if high > low else _HEIGHT // 2


def _y(value: float, scale: Axis) -> int:
    return round(_HEIGHT * scale.at(value) / 100)


def _pieces(stack: Sequence[tuple[str, float]], scale: Axis) -> tuple[tuple[str, int, int], ...]:
    """Rectangles from the bottom up; what is not zero stays visible."""
    made, total = [], 0.0
    for style, value in stack:
        bottom = _y(total, scale)
        total += value
        if value > 0:
            made.append((style, min(_y(total, scale), bottom - 4), bottom))
    return tuple(made)


def _path(places: Sequence[float], values: Sequence[float], scale: Axis, low: float, high: float) -> str:
    """A line that is broken where a value is not finite; a point by itself is drawn as a dot."""
    path, pen = "", "M"
    for x, value in zip(places, values, strict=True):
        if not math.isfinite(value):
            pen = "M"
            continue
        path += f"{pen}{_x(x, low, high)} {_y(value, scale)}" + ("h0" if pen == "M" else "")
        pen = "L"
    return path


def _apart(places: dict[str, float]) -> dict[str, float]:
    """Labels moved up or down until none covers another; the lowest stays above the bottom."""
    made: dict[str, float] = {}
    next_free = 0.0
    for i, (name, place) in enumerate(sorted(places.items(), key=lambda item: item[1])):
        made[name] = max(min(place, 100 - (len(places) - 1 - i) * _LABEL_GAP), next_free)
        next_free = made[name] + _LABEL_GAP
    return made
