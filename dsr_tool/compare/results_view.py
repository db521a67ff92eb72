"""Sections of the page with the results of a comparison, and with its machines and settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dsr_tool.compare.results import Row
from dsr_tool.report.page import numbers
from dsr_tool.report.page.parts import Figure, NoChart, Section, Table

__all__ = ["accuracy", "accuracy_text", "results_section", "setup_section", "sparsities"]


def sparsities(rows: Sequence[Row]) -> list[float]:
    """Returns the sparsities of rows, the highest first."""
    return sorted({row.sparsity for row in rows if row.sparsity is not None}, reverse=True)


def accuracy(row: Row) -> float:
    """Returns the mean test accuracy for ranking, 0 if there is none."""
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
    value = row.mean(figure)
    return numbers.NONE if value is None else text(value)


def _published(row: Row) -> str:
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
    machines = [record["machine"] for row in rows for record in row.complete if "machine" in record]
    kinds = [{**{key: value for key, value in one.items() if key != "versions"}, **one["versions"]} for one in machines]
    texts = [tuple((name, str(value)) for name, value in kind.items()) for kind in kinds]
    return [
        Table(f"Machine of {texts.count(one)} runs", ("name", "value"), one, frozenset({0, 1}))
        for one in dict.fromkeys(texts)
    ]


def _settings(rows: Sequence[Row]) -> list[Table]:
    """Returns a table of the settings that all methods share, and one per method of the others.

    Settings are those at the first sparsity of each method.
    """
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
    return ", ".join(map(str, value)) or numbers.NONE if isinstance(value, (list, tuple)) else str(value)
