"""Sections of the page with the results of a comparison and its settings, and what all its plots share."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dsr_tool.compare.results import Row
from dsr_tool.report.page import numbers
from dsr_tool.report.page.parts import Figure, Key, NoChart, Section, Table
from dsr_tool.report.page.plots import STYLES

__all__ = ["MethodStyles", "accuracy", "accuracy_text", "axis_start", "results_section", "setup_section", "sparsities"]

_AXIS_ROOM = 6.0
"""Start of an accuracy axis below the best value, in distances from the best to the median."""


@dataclass(frozen=True)
class MethodStyles:
    """Colors of the methods, the same in all plots.

    Attributes:
        by_method: style of the lines of each method.
    """

    by_method: Mapping[str, str]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> MethodStyles:
        """Assigns the styles in turn, in the order of the rows; the seventeenth method repeats the first."""
        methods = dict.fromkeys(row.method for row in rows)
        return cls({method: f"m{i % STYLES}" for i, method in enumerate(methods)})

    def legend(self, methods: Sequence[str]) -> list[Key]:
        """Returns the legend of some methods."""
        return [Key(f"line {self.by_method[method]}", method) for method in dict.fromkeys(methods)]


def axis_start(values: Sequence[float]) -> float:
    """Returns the start of the y-axis: a few values far below must not press all others into one line."""
    # From the median, which an outlier does not move. The axis spans 3 points of accuracy even if all rows are alike.
    best, middle = max(values), statistics.median(values)
    return best - _AXIS_ROOM * max(best - middle, 0.005)


def sparsities(rows: Sequence[Row]) -> list[float]:
    """Returns the sparsities of rows, the highest first."""
    return sorted({row.sparsity for row in rows if row.sparsity is not None}, reverse=True)


def accuracy(row: Row) -> float:
    """Returns the mean test accuracy for ranking, 0 if there is none."""
    # Rows without results come last in a ranking.
    return row.mean("test_accuracy") or 0.0


def accuracy_text(row: Row) -> str:
    """Returns mean, standard deviation and number of seeds as text, or the state of a row without results."""
    mean, sd = row.mean("test_accuracy"), row.sd("test_accuracy")
    if mean is None:
        return row.state
    return f"{numbers.percent(mean)}{'' if sd is None else f' ± {100 * sd:.2f}'} (n={len(row.complete)})"


def results_section(rows: Sequence[Row]) -> Section:
    """Returns the section with a table per sparsity, the best method first."""
    groups = [(f"Sparsity {s:g}", [row for row in rows if row.sparsity == s]) for s in sparsities(rows)]
    groups.append(("Without a sparsity", [row for row in rows if row.sparsity is None]))
    figures = [Figure(title, NoChart(), _table(title, group)) for title, group in groups if group]
    notes = [
        f"{cell.name} failed: {record['error']}"
        for row in rows
        for cell, record in zip(row.cells, row.records, strict=True)
        if record is not None and record["status"] == "failed"
    ]
    return Section("results", "Results", figures, notes=notes)


def _table(title: str, rows: Sequence[Row]) -> Table:
    """Returns the table of the rows, the best mean accuracy first."""
    headers = (
        "method",
        "accuracy",
        "published",
        "zeros",
        "non-zeros",
        "MACs",
        "archive",
        "training",
        "memory",
        "state",
    )
    ranked = sorted(rows, key=accuracy, reverse=True)
    return Table(title, headers, [_table_cells(row) for row in ranked])


def _table_cells(row: Row) -> list[str]:
    """Returns the cells of a row; a dash for figures that are unknown."""
    return [
        row.method,
        accuracy_text(row) if row.complete else numbers.NONE,
        _published(row),
        _mean(row, "model_sparsity", numbers.percent),
        _mean(row, "nonzeros", lambda value: numbers.count(round(value))),
        _mean(row, "inference_macs", lambda value: numbers.macs(round(value))),
        _mean(row, "archive_bytes", lambda value: numbers.byte_size(round(value))),
        _mean(row, "train_time_s", lambda value: f"{value:,.0f}{numbers.GAP}s"),
        _mean(row, "peak_memory_bytes", lambda value: numbers.byte_size(round(value))),
        row.state or "complete",
    ]


def _mean(row: Row, figure: str, text: Callable[[float], str]) -> str:
    """Returns the mean of a figure as text; a dash if it is unknown."""
    value = row.mean(figure)
    return numbers.NONE if value is None else text(value)


def _published(row: Row) -> str:
    """Returns the published accuracy with its standard deviation; a dash without one."""
    if not row.published:
        return numbers.NONE
    spread = f" ± {100 * row.published['sd']:.2f}" if "sd" in row.published else ""
    return f"{numbers.percent(row.published['accuracy'])}{spread}"


def setup_section(rows: Sequence[Row]) -> list[Section]:
    """Returns the section with the machines, the settings that all methods share, and those of each method."""
    tables = [*_machines(rows), *_settings(rows)]
    figures = [Figure(table.caption, NoChart(), table) for table in tables if table.rows]
    return [Section("setup", "Machines and settings", figures, layout="settings")] if figures else []


def _machines(rows: Sequence[Row]) -> list[Table]:
    """Returns a table for each machine; runs of other versions of a library count as another machine."""
    machines = [record["machine"] for row in rows for record in row.complete if "machine" in record]
    kinds = [{**{key: value for key, value in one.items() if key != "versions"}, **one["versions"]} for one in machines]
    # Tuples, because they are counted and used as keys.
    texts = [tuple((name, str(value)) for name, value in kind.items()) for kind in kinds]
    return [
        Table(f"Machine of {texts.count(one)} runs", ("name", "value"), one, frozenset({0, 1}))
        for one in dict.fromkeys(texts)
    ]


def _settings(rows: Sequence[Row]) -> list[Table]:
    """Returns a table of the settings that all methods share, and one per method of the others.

    Settings are those at the lowest sparsity of each method: sparsities share all others, except in families that tune
    a method for each.
    """
    # Rows of a method come in descending sparsity, and the last one stays.
    recipes = {row.method: row.cells[0].recipe for row in rows}
    settings = {
        method: {key: _plain(value) for key, value in {**recipe.model, **recipe.train, **recipe.options}.items()}
        for method, recipe in recipes.items()
    }
    first = next(iter(settings.values()), {})
    common = {key: value for key, value in first.items() if all(own.get(key) == value for own in settings.values())}
    named = [("Settings of all methods", common)]
    named += [
        (f"Settings of {recipes[method].name}", {key: value for key, value in own.items() if key not in common})
        for method, own in settings.items()
    ]
    return [Table(title, ("name", "value"), list(values.items()), frozenset({0, 1})) for title, values in named]


def _plain(value: object) -> str:
    """Returns a setting as text, lists without brackets."""
    return ", ".join(map(str, value)) or numbers.NONE if isinstance(value, (list, tuple)) else str(value)
