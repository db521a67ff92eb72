"""The page of a comparison: accuracy against size, curves over the epochs, and densities by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dsr_tool.compare.cells import Comparison, Grid
from dsr_tool.compare.curves import curves
from dsr_tool.compare.curves_view import density_section, time_section
from dsr_tool.compare.results import Row, data_text
from dsr_tool.compare.results_view import (
    MethodStyles,
    accuracy,
    accuracy_text,
    axis_start,
    results_section,
    setup_section,
    sparsities,
)
from dsr_tool.report.page import numbers
from dsr_tool.report.page.page import rendered
from dsr_tool.report.page.parts import Figure, Number, Section, Table
from dsr_tool.report.page.plots import Point, Trace, plot

__all__ = ["page_html"]

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
    styles = MethodStyles.of(rows)
    run_curves = [curve for row in rows if (curve := curves(comparison, row)) is not None]
    sections = [
        results_section(rows),
        *_sizes(rows, styles),
        *time_section(run_curves, styles),
        *density_section(run_curves),
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


def _headline(rows: Sequence[Row], document: Mapping[str, Any]) -> list[Number]:
    """Returns the number of complete runs, and the two best methods at the highest sparsity."""
    counts = document["counts"]
    rest = [f"{count} {status}" for status, count in counts.items() if count and status != "complete"]
    found = [Number("Runs complete", f"{counts['complete']} of {sum(counts.values())}", ", ".join(rest))]
    # The highest sparsity is the hardest, where methods differ most.
    for sparsity in sparsities(rows)[:1]:
        ranked = sorted((row for row in rows if row.sparsity == sparsity and row.complete), key=accuracy, reverse=True)
        found += [
            Number(f"{'Best' if i == 0 else 'Second'} at sparsity {sparsity:g}", row.method, accuracy_text(row))
            for i, row in enumerate(ranked[:2])
        ]
    return found


def _sizes(rows: Sequence[Row], styles: MethodStyles) -> list[Section]:
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
    title: str, figure: str, text: Callable[[float], str], rows: Sequence[Row], styles: MethodStyles
) -> Figure:
    """Returns the figure of accuracy against one size, with a line for each method.

    Args:
        title: title of the figure and its table.
        figure: name of the size among the figures of a row.
        text: function from a size to its text.
        rows: rows with results.
        styles: colors of the methods.
    """
    lowest = axis_start([accuracy(row) for row in rows])
    traces = []
    for method in dict.fromkeys(row.method for row in rows):
        # A size of 0 or None has no place on a logarithmic axis.
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
    """Returns the name of a row."""
    return row.method if row.sparsity is None else f"{row.method} at {row.sparsity:g}"


def _short_bytes(value: float) -> str:
    """Formats bytes with three digits, for labels of an axis."""
    return numbers.in_unit(float(f"{value:.3g}"), numbers.scaled(value, ("B", "kB", "MB", "GB")))


def _short_macs(value: float) -> str:
    """Formats multiply-adds with three digits, for labels of an axis."""
    return numbers.in_unit(float(f"{value:.3g}"), numbers.scaled(value, ("", "k", "M", "G")))
