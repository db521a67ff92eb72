"""What came of a comparison: one row for each method and sparsity, as a document, a table and CSV."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsr_tool.compare.cells import Cell, Comparison, Grid
from dsr_tool.report.page.numbers import significant
from dsr_tool.report.tables import plain_table, render

__all__ = ["SCHEMA", "Row", "csv_text", "document", "rows", "table_text", "told_data"]

SCHEMA = "dsr-tool/compare/1"
_FIGURES = (
    "test_accuracy",
    "best_test_accuracy",
    "sparsity",
    "model_sparsity",
    "nonzeros",
    "parameters",
    "inference_macs",
    "archive_bytes",
    "train_time_s",
    "peak_memory_bytes",
)
_COLUMNS = ("accuracy %", "± sd", "n", "published", "zeros", "non-zeros", "MMACs", "archive kB", "train s", "memory MB")


@dataclass(frozen=True)
class Row:
    """All seeds of one method at one sparsity.

    Attributes:
        method: its name in the recipe.
        sparsity: of the prunable weights; None for a method that has none.
        cells: one for each seed.
        records: what became of each of them; None for nothing yet.
        published: what the recipe's source reports; empty where it does not, or on other data.
    """

    method: str
    sparsity: float | None
    cells: tuple[Cell, ...]
    records: tuple[Mapping[str, Any] | None, ...]
    published: Mapping[str, Any] = field(default_factory=dict)

    @property
    def complete(self) -> list[Mapping[str, Any]]:
        """Records of the cells that are complete."""
        return [record for record in self.records if record is not None and record["status"] == "complete"]

    @property
    def state(self) -> str:
        """In words what is missing; empty where nothing is."""
        counted = {"failed": 0, "paused": 0, "not run": 0}
        for record in self.records:
            status = record["status"] if record is not None else "not run"
            if status != "complete":
                counted[status] += 1
        found = [(word, count) for word, count in counted.items() if count]
        if len(found) == 1 and found[0][1] == len(self.cells):
            return found[0][0]
        return ", ".join(f"{count} {word}" for word, count in found)

    def mean(self, figure: str) -> float | None:
        """Mean over the complete cells; None where there is none, or one does not have the figure."""
        values = [record.get(figure) for record in self.complete]
        known = [value for value in values if value is not None]
        return statistics.fmean(known) if known and len(known) == len(values) else None

    def sd(self, figure: str) -> float | None:
        """Sample standard deviation over the complete cells; None below two of them."""
        values = [record[figure] for record in self.complete]
        return statistics.stdev(values) if len(values) > 1 else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "method": self.method,
            "asked_sparsity": self.sparsity,
            "n": len(self.complete),
            "of": len(self.cells),
            "state": self.state or "complete",
            **{figure: self.mean(figure) for figure in _FIGURES},
            "test_accuracy_sd": self.sd("test_accuracy"),
            "published": dict(self.published) or None,
            "errors": [record["error"] for record in self.records if record and record["status"] == "failed"],
        }


def rows(comparison: Comparison, grid: Grid) -> list[Row]:
    """One row for each method and sparsity, in the order of the recipe's methods and of rising density."""
    of: dict[tuple[str, float | None], list[Cell]] = {}
    for cell in grid.cells:
        of.setdefault((cell.method, cell.sparsity), []).append(cell)
    methods = list(dict.fromkeys(method for method, _ in of))
    keys = sorted(of, key=lambda key: (methods.index(key[0]), -(key[1] or 0.0)))
    return [
        Row(*key, tuple(of[key]), tuple(comparison.record(cell.name) for cell in of[key]), _published(grid, of[key][0]))
        for key in keys
    ]


def _published(grid: Grid, cell: Cell) -> Mapping[str, Any]:
    return cell.recipe.paper if cell.recipe.data == grid.data.partition(":")[0] else {}


def document(comparison: Comparison, grid: Grid) -> dict[str, Any]:
    """All of it as plain values, schema `dsr-tool/compare/1`: means by row, and every cell."""
    found = rows(comparison, grid)
    cells = [(cell, record) for row in found for cell, record in zip(row.cells, row.records, strict=True)]
    counted = [record["status"] if record else "not run" for _, record in cells]
    return {
        "schema": SCHEMA,
        "path": str(comparison.path),
        "title": grid.title,
        "data": grid.data,
        "counts": {status: counted.count(status) for status in ("complete", "failed", "paused", "not run")},
        "rows": [row.to_dict() for row in found],
        "cells": [_cell(cell, record) for cell, record in cells],
    }


def _cell(cell: Cell, record: Mapping[str, Any] | None) -> dict[str, Any]:
    about = {"cell": cell.name, "method": cell.method, "asked_sparsity": cell.sparsity, "seed": cell.seed}
    return {**about, "recipe": cell.recipe.name, **(record or {"status": "not run"})}


def told_data(grid: Grid) -> str:
    """The data, and that it is not the recipe's where it is not: the title names that one."""
    meant = grid.cells[0].recipe.data if grid.cells else ""
    return f"data {grid.data}" + (f" in place of {meant}" if meant and meant != grid.data.partition(":")[0] else "")


def table_text(grid: Grid, found: Sequence[Row]) -> str:
    """The table for people: means over the seeds, and what is missing."""
    table = plain_table("method", "sparsity", *_COLUMNS, "state", numbers=(*_COLUMNS, "sparsity"))
    for row in found:
        table.add_row(*_words(row))
    failed = [record for row in found for record in row.records if record and record["status"] == "failed"]
    notes = [f"failed: {record.get('cell', '')}: {record['error']}" for record in failed]
    closing = (
        "Accuracy: of the last epoch on the test images, mean and sample standard deviation over n seeds; published: "
        "as the recipe's source has it.\nZeros: of the whole model. MMACs: millions of multiply-adds with active "
        "weights, for one input. Memory: most that training took on a GPU, or that the process held on a CPU."
    )
    return "\n".join([f"{grid.title}, {told_data(grid)}", render(table), closing, *notes])


def _words(row: Row) -> list[str]:
    published = row.published
    return [
        row.method,
        "" if row.sparsity is None else f"{row.sparsity:g}",
        _shown(row.mean("test_accuracy"), 100, 2),
        _shown(row.sd("test_accuracy"), 100, 2),
        str(len(row.complete)),
        _shown(published.get("accuracy"), 100, 2) + (f" ± {100 * published['sd']:.2f}" if "sd" in published else ""),
        _shown(row.mean("model_sparsity"), 1, 4),
        _shown(row.mean("nonzeros"), 1, 0),
        "" if (macs := row.mean("inference_macs")) is None else significant(macs / 1e6),
        _shown(row.mean("archive_bytes"), 1e-3, 1),
        _shown(row.mean("train_time_s"), 1, 0),
        _shown(row.mean("peak_memory_bytes"), 1e-6, 0),
        row.state,
    ]


def _shown(value: float | None, factor: float, decimals: int) -> str:
    return "" if value is None else f"{value * factor:,.{decimals}f}"


def csv_text(found: Sequence[Row]) -> str:
    """The rows with all figures in base units, for a spreadsheet."""
    text = io.StringIO()
    columns = ("method", "asked_sparsity", "n", "of", "state", "test_accuracy", "test_accuracy_sd", *_FIGURES[1:])
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: "" if v is None else v for k, v in row.to_dict().items()} for row in found)
    return text.getvalue()
