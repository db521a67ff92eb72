"""Results of a comparison: one row per method and sparsity, as JSON document, text table and CSV."""

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

__all__ = ["SCHEMA", "Row", "csv_text", "document", "rows", "table_text", "data_text"]

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
"""Figures of a record whose means are columns of CSV and JSON."""

# Headings of the text table, between the row's name and its state.
_COLUMNS = ("accuracy %", "sd", "n", "published", "zeros", "non-zeros", "MMACs", "archive kB", "train s", "memory MB")


@dataclass(frozen=True)
class Row:
    """All seeds of one method at one sparsity.

    Attributes:
        method: name of the method in the recipe.
        sparsity: fraction of zeros among the prunable weights; None for a method that has none.
        cells: cells, one per seed.
        records: record of each cell; None for a cell that has not run.
        published: result that the recipe's source reports; empty if it reports none, or the data differ.
    """

    method: str
    sparsity: float | None
    cells: tuple[Cell, ...]
    records: tuple[Mapping[str, Any] | None, ...]
    published: Mapping[str, Any] = field(default_factory=dict)

    @property
    def complete(self) -> list[Mapping[str, Any]]:
        """Records of the complete cells."""
        return [record for record in self.records if record is not None and record["status"] == "complete"]

    @property
    def state(self) -> str:
        """Numbers of cells that are not complete, in words, such as `1 failed, 2 not run`; empty if all are."""
        counted = {"failed": 0, "paused": 0, "not run": 0}
        for record in self.records:
            status = record["status"] if record is not None else "not run"
            if status != "complete":
                counted[status] += 1
        found = [(word, count) for word, count in counted.items() if count]
        # "failed" instead of "3 failed" if it holds for all seeds.
        if len(found) == 1 and found[0][1] == len(self.cells):
            return found[0][0]
        return ", ".join(f"{count} {word}" for word, count in found)

    def mean(self, figure: str) -> float | None:
        """Returns the mean of a figure over the complete cells; None if there are none, or one lacks the figure."""
        values = [record.get(figure) for record in self.complete]
        # Older records lack newer figures, and a mean over some of the seeds would not be comparable.
        known = [value for value in values if value is not None]
        return statistics.fmean(known) if known and len(known) == len(values) else None

    def sd(self, figure: str) -> float | None:
        """Returns the sample standard deviation of a figure over the complete cells; None for fewer than two."""
        values = [record[figure] for record in self.complete]
        return statistics.stdev(values) if len(values) > 1 else None

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return {
            "method": self.method,
            "asked_sparsity": self.sparsity,
            "n": len(self.complete),
            "of": len(self.cells),
            "state": self.state or "complete",
            # Means under the names of the figures: readers of JSON and CSV find the same keys as in a record.
            **{figure: self.mean(figure) for figure in _FIGURES},
            "test_accuracy_sd": self.sd("test_accuracy"),
            "published": dict(self.published) or None,
            "errors": [record["error"] for record in self.records if record and record["status"] == "failed"],
        }


def rows(comparison: Comparison, grid: Grid) -> list[Row]:
    """Returns one row per method and sparsity, in the order of the grid's methods, the highest sparsity first."""
    by_key: dict[tuple[str, float | None], list[Cell]] = {}
    for cell in grid.cells:
        by_key.setdefault((cell.method, cell.sparsity), []).append(cell)
    methods = list(dict.fromkeys(method for method, _ in by_key))
    # `or 0.0`: a method without sparsity has one row, so any key will do.
    keys = sorted(by_key, key=lambda key: (methods.index(key[0]), -(key[1] or 0.0)))
    return [
        Row(
            *key,
            tuple(by_key[key]),
            tuple(comparison.record(cell.name) for cell in by_key[key]),
            _published(grid, by_key[key][0]),
        )
        for key in keys
    ]


def _published(grid: Grid, cell: Cell) -> Mapping[str, Any]:
    """Returns the result that the recipe's source reports; empty for other data, where it is no reference."""
    return cell.recipe.paper if cell.recipe.data == grid.data.partition(":")[0] else {}


def document(comparison: Comparison, grid: Grid, table_rows: Sequence[Row]) -> dict[str, Any]:
    """Returns means by row and every cell as plain values, schema `dsr-tool/compare/1`."""
    cells = [(cell, record) for row in table_rows for cell, record in zip(row.cells, row.records, strict=True)]
    states = [record["status"] if record else "not run" for _, record in cells]
    return {
        "schema": SCHEMA,
        "path": str(comparison.path),
        "title": grid.title,
        "data": grid.data,
        "counts": {status: states.count(status) for status in ("complete", "failed", "paused", "not run")},
        "rows": [row.to_dict() for row in table_rows],
        "cells": [_cell(cell, record) for cell, record in cells],
    }


def _cell(cell: Cell, record: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns a cell with the fields of its record as plain values."""
    about = {"cell": cell.name, "method": cell.method, "asked_sparsity": cell.sparsity, "seed": cell.seed}
    return {**about, "recipe": cell.recipe.name, **(record or {"status": "not run"})}


def data_text(grid: Grid) -> str:
    """Returns the name of the data, and the data of the recipe if that is another, since the title names the latter."""
    of_recipe = grid.cells[0].recipe.data if grid.cells else ""
    return f"data {grid.data}" + (
        f" in place of {of_recipe}" if of_recipe and of_recipe != grid.data.partition(":")[0] else ""
    )


def table_text(grid: Grid, table_rows: Sequence[Row]) -> str:
    """Returns the table as text: means over the seeds, and the cells that are missing."""
    table = plain_table("method", "sparsity", *_COLUMNS, "state", numbers=(*_COLUMNS, "sparsity"))
    for row in table_rows:
        table.add_row(*_table_cells(row))
    failed = [record for row in table_rows for record in row.records if record and record["status"] == "failed"]
    notes = [f"failed: {record.get('cell', '')}: {record['error']}" for record in failed]
    closing = (
        "Accuracy: of the last epoch on the test images, mean and sample standard deviation over n seeds; published: "
        "as the recipe's source has it.\nZeros: of the whole model. MMACs: millions of multiply-adds with active "
        "weights, for one input. Memory: most that training took on a GPU, or that the process held on a CPU."
    )
    return "\n".join([f"{grid.title}, {data_text(grid)}", render(table), closing, *notes])


def _table_cells(row: Row) -> list[str]:
    """Returns the cells of a row; figures that are unknown are empty."""
    published = row.published
    return [
        row.method,
        "" if row.sparsity is None else f"{row.sparsity:g}",
        _scaled(row.mean("test_accuracy"), 100, 2),
        _scaled(row.sd("test_accuracy"), 100, 2),
        str(len(row.complete)),
        _scaled(published.get("accuracy"), 100, 2) + (f" +/- {100 * published['sd']:.2f}" if "sd" in published else ""),
        _scaled(row.mean("model_sparsity"), 1, 4),
        _scaled(row.mean("nonzeros"), 1, 0),
        "" if (macs := row.mean("inference_macs")) is None else significant(macs / 1e6),
        _scaled(row.mean("archive_bytes"), 1e-3, 1),
        _scaled(row.mean("train_time_s"), 1, 0),
        _scaled(row.mean("peak_memory_bytes"), 1e-6, 0),
        row.state,
    ]


def _scaled(value: float | None, factor: float, decimals: int) -> str:
    """Formats a figure in another unit; empty if it is unknown."""
    return "" if value is None else f"{value * factor:,.{decimals}f}"


def csv_text(table_rows: Sequence[Row]) -> str:
    """Returns the rows as CSV, with all figures in base units."""
    text = io.StringIO()
    # The accuracy and its deviation stand together; the rest of the figures follow in their order.
    columns = ("method", "asked_sparsity", "n", "of", "state", "test_accuracy", "test_accuracy_sd", *_FIGURES[1:])
    # Fixed line ends, so that every system writes the same bytes.
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: "" if v is None else v for k, v in row.to_dict().items()} for row in table_rows)
    return text.getvalue()
