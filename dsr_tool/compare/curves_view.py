"""Sections of the page over the epochs: accuracy, exploration, and density by layer."""

from __future__ import annotations

from collections.abc import Sequence

from dsr_tool.compare.curves import Curves
from dsr_tool.compare.results_view import MethodStyles, axis_start, sparsities
from dsr_tool.report.page import numbers
from dsr_tool.report.page.parts import Figure, Section, Table
from dsr_tool.report.page.plots import Point, Trace, plot
from dsr_tool.report.page.run_view import density_figure

__all__ = ["density_section", "time_section"]

_MAX_DENSITY_MAPS, _MAX_SPARSITIES = 6, 6
"""Largest number of density charts, and of sparsities with charts over the epochs."""


def time_section(run_curves: Sequence[Curves], styles: MethodStyles) -> list[Section]:
    """Returns the section with accuracy and exploration by epoch, at each sparsity."""
    figures = []
    for sparsity in sparsities([curve.row for curve in run_curves])[:_MAX_SPARSITIES]:
        here = [curve for curve in run_curves if curve.row.sparsity == sparsity]
        finals = [curve.accuracy[-1] for curve in here]
        figures.append(
            _by_epoch(f"Accuracy by epoch at sparsity {sparsity:g}", here, styles, "accuracy", axis_start(finals))
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
    title: str, here: Sequence[Curves], styles: MethodStyles, figure: str, lowest: float = 0.0, remark: str = ""
) -> Figure:
    """Returns the figure of one curve by epoch, with a line for each method.

    Args:
        title: title of the figure and its table.
        here: curves at one sparsity.
        styles: colors of the methods.
        figure: `accuracy` or `explored`, the field of the curves.
        lowest: start of the y-axis, if it is above 0.
        remark: sentence below the title, for an axis that starts at 0.
    """
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
    # An axis that does not start at 0 makes differences look larger, so the page says where it starts.
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


def density_section(run_curves: Sequence[Curves]) -> list[Section]:
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
