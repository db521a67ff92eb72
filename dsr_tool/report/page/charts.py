"""The geometry of charts of columns, of bars and of one stacked bar; the templates turn them into SVG.

Lengths are in percent of the plot, or in a view box that is stretched over it. Text is never scaled, so it is as
readable on a phone as on a desk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dsr_tool.report.page.axes import Axis, Tick, axis, layer_ticks

__all__ = ["Bar", "Column", "Columns", "Series", "bars", "columns"]

_COLUMN_WIDTH = 10
"""Width of a column in its view box, with the gap to the next one."""
_CROWDED = 90
"""Number of columns above which they are drawn without gaps."""
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
    # The scale covers the stepped line too: an entropy bound may exceed the bytes of a layer.
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
    path = "".join(
        f"M{i * _COLUMN_WIDTH + 1} {scale.view_y(value)}h{_COLUMN_WIDTH - 2}" for i, value in enumerate(step)
    )
    # SVG text cannot wrap or thin out by itself, so labels for both widths are on the page and CSS shows one.
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


def _pieces(stack: Sequence[tuple[str, float]], scale: Axis) -> tuple[tuple[str, int, int], ...]:
    """Returns the pieces of a column as (CSS class, top, bottom), from the bottom up; zeros have none."""
    pieces, total = [], 0.0
    for style, value in stack:
        bottom = scale.view_y(total)
        total += value
        if value > 0:
            # May overlap the piece above by a few units, which is drawn later and covers it.
            pieces.append((style, min(scale.view_y(total), bottom - _MIN_PIECE), bottom))
    return tuple(pieces)
