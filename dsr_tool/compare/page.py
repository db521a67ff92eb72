"""The page of a comparison: accuracy against size, curves over the epochs, and densities by layer."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsr_tool.compare.cells import Comparison, Grid
from dsr_tool.compare.curves import Curves, curves
from dsr_tool.compare.results import Row, data_text
from dsr_tool.compare.results_view import accuracy, accuracy_text, results_section, setup_section, sparsities
from dsr_tool.report.page import numbers
from dsr_tool.report.page.page import rendered
from dsr_tool.report.page.parts import Figure, Key, Number, Section, Table
from dsr_tool.report.page.plots import STYLES, Point, Trace, plot
from dsr_tool.report.page.run_view import density_figure

__all__ = ["page_html"]

_MAX_DENSITY_MAPS, _MAX_SPARSITIES = 6, 6
"""Largest number of density charts, and of sparsities with charts over the epochs."""

_AXIS_ROOM = 6.0
"""Start of an accuracy axis below the best value, in distances from the best to the median."""

_CLOSING = (
    "Accuracy is that of the last epoch on the test images: no epoch was chosen by it. Mean and sample standard "
    "deviation are over the seeds. kB are 1,000 bytes, of the exported archive with exact fp32 values. MACs are "
    "multiply-adds of one input with active weights. Memory is the most that training took on a GPU, or that the "
    "process held on a CPU, libraries included."
)


def page_html(comparison: Comparison, grid: Grid, rows: Sequence[Row], document: Mapping[str, Any]) -> str:
    """Returns the page as self-contained HTML.

    Args:
        comparison: folder with the logs of the runs.
        grid: all cells.
        rows: results of the cells.
        document: the results as plain values.

    Raises:
        FormatError: a log is damaged.
    """
    styles = _MethodStyles.of(rows)
    run_curves = [curve for row in rows if (curve := curves(comparison, row)) is not None]
    sections = [
        results_section(rows),
        *_sizes(rows, styles),
        *_time(run_curves, styles),
        *_densities(run_curves),
        *setup_section(rows),
    ]
    return rendered(
        what="comparison",
        title=grid.title,
        kind=data_text(grid),
        path=str(comparison.path),
        headline=_headline(rows, document),
        sections=sections,
        input_shape="",
        folded=False,
        closing=_CLOSING,
    )


@dataclass(frozen=True)
class _MethodStyles:
    """Colours of the methods, the same in all plots.

    Attributes:
        by_method: style of the lines of each method.
    """

    by_method: Mapping[str, str]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> _MethodStyles:
        methods = dict.fromkeys(row.method for row in rows)
        """Assigns the styles in turn, in the order of the rows."""
        return cls({method: f"m{i % STYLES}" for i, method in enumerate(methods)})

    def legend(self, methods: Sequence[str]) -> list[Key]:
        """Returns the legend of some methods."""
        return [Key(f"line {self.by_method[method]}", method) for method in dict.fromkeys(methods)]


def _headline(rows: Sequence[Row], document: Mapping[str, Any]) -> list[Number]:
    counts = document["counts"]
    rest = [f"{count} {status}" for status, count in counts.items() if count and status != "complete"]
    found = [Number("Runs complete", f"{counts['complete']} of {sum(counts.values())}", ", ".join(rest))]
    for sparsity in sparsities(rows)[:1]:
        ranked = sorted((row for row in rows if row.sparsity == sparsity and row.complete), key=accuracy, reverse=True)
        found += [
            Number(f"{'Best' if i == 0 else 'Second'} at sparsity {sparsity:g}", row.method, accuracy_text(row))
            for i, row in enumerate(ranked[:2])
        ]
    return found


def _sizes(rows: Sequence[Row], styles: _MethodStyles) -> list[Section]:
    """Returns the section with accuracy against bytes and multiply-adds, a line per method."""
    known = [row for row in rows if row.complete]  # a row without results is no point of a plot
    if not known:
        return []
    kinds = (
        ("Accuracy against bytes of the archive", "archive_bytes", _short_bytes),
        ("Accuracy against multiply-adds", "inference_macs", _short_macs),
    )
    figures = [_against(title, figure, text, known, styles) for title, figure, text in kinds]
    return [Section("sizes", "Accuracy against size", figures, layout="pairs")]


def _against(
    title: str, figure: str, text: Callable[[float], str], rows: Sequence[Row], styles: _MethodStyles
) -> Figure:
    lowest = _lowest([accuracy(row) for row in rows])
    traces = []
    for method in dict.fromkeys(row.method for row in rows):
        own = [row for row in rows if row.method == method and row.mean(figure)]
        points = [
            Point(
                row.mean(figure) or 1.0,
                accuracy(row),
                row.sd("test_accuracy") or 0.0,
                f"{_label(row)}: {accuracy_text(row)}, {text(row.mean(figure) or 0.0)}",
            )
            for row in own
        ]
        traces.append(Trace(method, styles.by_method[method], points))
    below = [f"{_label(row)} ({numbers.percent(accuracy(row))})" for row in rows if accuracy(row) < lowest]
    table_rows = [(_label(row), text(row.mean(figure) or 0.0), accuracy_text(row)) for row in rows]
    return Figure(
        title,
        plot(traces, numbers.round_percent, text, lowest=lowest),
        Table(title, ("method", "size", "accuracy"), table_rows),
        "Bars are one standard deviation up and down; the scale of sizes is logarithmic."
        + (f" Below the plot: {', '.join(below)}." if below else ""),
        styles.legend([row.method for row in rows]),
    )


def _label(row: Row) -> str:
    return row.method if row.sparsity is None else f"{row.method} at {row.sparsity:g}"


def _short_bytes(value: float) -> str:
    return numbers.in_unit(float(f"{value:.3g}"), numbers.scaled(value, ("B", "kB", "MB", "GB")))


def _short_macs(value: float) -> str:
    return numbers.in_unit(float(f"{value:.3g}"), numbers.scaled(value, ("", "k", "M", "G")))


def _lowest(values: Sequence[float]) -> float:
    """Returns the start of the y-axis: a few values far below must not press all others into one line."""
    best, middle = max(values), statistics.median(values)
    return best - _AXIS_ROOM * max(best - middle, 0.005)


def _time(run_curves: Sequence[Curves], styles: _MethodStyles) -> list[Section]:
    """Returns the section with accuracy and exploration by epoch, at each sparsity."""
    figures = []
    for sparsity in sparsities([curve.row for curve in run_curves])[:_MAX_SPARSITIES]:
        here = [curve for curve in run_curves if curve.row.sparsity == sparsity]
        finals = [curve.accuracy[-1] for curve in here]
        figures.append(
            _by_epoch(f"Accuracy by epoch at sparsity {sparsity:g}", here, styles, "accuracy", _lowest(finals))
        )
        moving = [curve for curve in here if curve.explored and curve.explored[0] < 1]
        # Methods that start dense have explored everything from the first epoch; a sentence says that better.
        if moving:
            title = f"Share of weights ever active by epoch at sparsity {sparsity:g}"
            whole = [curve.row.method for curve in here if curve.explored and curve.explored[0] == 1]
            remark = f"All weights were active at first in {', '.join(whole)}." if whole else ""
            figures.append(_by_epoch(title, moving, styles, "explored", remark=remark))
    return [Section("time", "Over time", figures, layout="pairs")] if figures else []


def _by_epoch(
    title: str, here: Sequence[Curves], styles: _MethodStyles, figure: str, lowest: float = 0.0, remark: str = ""
) -> Figure:
    traces = [
        Trace(
            curve.row.method,
            styles.by_method[curve.row.method],
            [Point(x, y) for x, y in zip(curve.epochs, getattr(curve, figure), strict=True)],
        )
        for curve in here
    ]
    columns = _some_epochs(max(len(curve.epochs) for curve in here))
    rows = [
        (curve.row.method, *(numbers.percent(values[i - 1]) if i <= len(values) else numbers.NONE for i in columns))
        for curve in here
        for values in [getattr(curve, figure)]
    ]
    below = [curve.row.method for curve in here if max(getattr(curve, figure)) < lowest]
    if lowest > 0:
        remark = f"The scale begins at {numbers.percent(lowest, 1)}. "
    return Figure(
        title,
        plot(traces, numbers.round_percent, lowest=lowest, marked=False),
        Table(title, ("method", *(f"epoch {i}" for i in columns)), rows),
        f"Mean over the seeds. {remark}" + (f"Below it all the time: {', '.join(below)}." if below else ""),
        styles.legend([curve.row.method for curve in here]),
    )


def _some_epochs(count: int, most: int = 6) -> list[int]:
    """Returns the numbers of at most `most` epochs, evenly spread, with the first and the last."""
    return sorted({round(1 + i * (count - 1) / (most - 1)) for i in range(most)})


def _densities(run_curves: Sequence[Curves]) -> list[Section]:
    """Returns the section with the density by layer and epoch of methods that change it, at the highest sparsity."""
    highest = sparsities([curve.row for curve in run_curves])[:1]
    moving = [
        curve
        for curve in run_curves
        if curve.row.sparsity in highest and len(curve.first) > 1 and curve.first[0].density != curve.first[-1].density
    ]
    figures = []
    for curve in moving[:_MAX_DENSITY_MAPS]:
        figure = density_figure(curve.first)
        title = f"{curve.row.method}: density by layer and epoch"
        figures.append(Figure(title, figure.chart, figure.table, figure.finding, figure.legend))
    lead = (
        f"At sparsity {highest[0]:g}, the first seed of each method that moves weights between layers."
        if highest
        else ""
    )
    return [Section("density", "Density by layer", figures, lead, layout="pairs")] if figures else []
