"""The results of a comparison, and how they were had, as sections of its page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dsr_tool.compare.results import Row
from dsr_tool.report.page import numbers
from dsr_tool.report.page.parts import Figure, Section, Table, Words

__all__ = ["accuracy", "results_section", "setup_section", "sparsities", "spread"]


def sparsities(rows: Sequence[Row]) -> list[float]:
    """Those of the grid, the highest first."""
    return sorted({row.sparsity for row in rows if row.sparsity is not None}, reverse=True)


def accuracy(row: Row) -> float:
    """Mean test accuracy; 0 where there is none, for ranking."""
    return row.mean("test_accuracy") or 0.0


def spread(row: Row) -> str:
    """Mean, standard deviation and number of seeds."""
    mean, sd = row.mean("test_accuracy"), row.sd("test_accuracy")
    if mean is None:
        return row.state
    return f"{numbers.percent(mean)}{'' if sd is None else f' ± {100 * sd:.2f}'} (n={len(row.complete)})"


def results_section(rows: Sequence[Row]) -> Section:
    """A table for each sparsity, the best method first."""
    groups = [(f"Sparsity {s:g}", [row for row in rows if row.sparsity == s]) for s in sparsities(rows)]
    groups.append(("Without a sparsity", [row for row in rows if row.sparsity is None]))
    figures = [Figure(title, Words(), _table(title, group)) for title, group in groups if group]
    notes = [
        f"{cell.name} failed: {record['error']}"
        for row in rows
        for cell, record in zip(row.cells, row.records, strict=True)
        if record is not None and record["status"] == "failed"
    ]
    return Section("results", "Results", figures, notes=notes)


def _table(title: str, rows: Sequence[Row]) -> Table:
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
    return Table(title, headers, [_words(row) for row in ranked])


def _words(row: Row) -> list[str]:
    return [
        row.method,
        spread(row) if row.complete else numbers.NONE,
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
    value = row.mean(figure)
    return numbers.NONE if value is None else text(value)


def _published(row: Row) -> str:
    if not row.published:
        return numbers.NONE
    spread = f" ± {100 * row.published['sd']:.2f}" if "sd" in row.published else ""
    return f"{numbers.percent(row.published['accuracy'])}{spread}"


def setup_section(rows: Sequence[Row]) -> list[Section]:
    """On what the runs were made, what all of them were told, and what each method alone was."""
    tables = [*_machines(rows), *_settings(rows)]
    figures = [Figure(table.caption, Words(), table) for table in tables if table.rows]
    return [Section("setup", "Machines and settings", figures, layout="settings")] if figures else []


def _machines(rows: Sequence[Row]) -> list[Table]:
    machines = [record["machine"] for row in rows for record in row.complete if "machine" in record]
    kinds = [{**{key: value for key, value in one.items() if key != "versions"}, **one["versions"]} for one in machines]
    said = [tuple((name, str(value)) for name, value in kind.items()) for kind in kinds]
    return [
        Table(f"Machine of {said.count(one)} runs", ("name", "value"), one, frozenset({0, 1}))
        for one in dict.fromkeys(said)
    ]


def _settings(rows: Sequence[Row]) -> list[Table]:
    """What is the same for all methods once, and then what is not, at the first sparsity of each."""
    recipes = {row.method: row.cells[0].recipe for row in rows}
    told = {
        method: {key: _plain(value) for key, value in {**recipe.model, **recipe.train, **recipe.options}.items()}
        for method, recipe in recipes.items()
    }
    first = next(iter(told.values()), {})
    common = {key: value for key, value in first.items() if all(own.get(key) == value for own in told.values())}
    named = [("Settings of all methods", common)]
    named += [
        (f"Settings of {recipes[method].name}", {key: value for key, value in own.items() if key not in common})
        for method, own in told.items()
    ]
    return [Table(title, ("name", "value"), list(values.items()), frozenset({0, 1})) for title, values in named]


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) or numbers.NONE if isinstance(value, (list, tuple)) else str(value)
