"""Writes the results of a comparison: its table as text, CSV and JSON, and its page."""

from __future__ import annotations

import json
from typing import Any

from dsr_tool.compare.cells import Comparison, Grid
from dsr_tool.compare.page import page_html
from dsr_tool.compare.results import csv_text, document, rows, table_text
from dsr_tool.files import new_file

__all__ = ["write_outputs"]


def write_outputs(comparison: Comparison, grid: Grid) -> tuple[dict[str, Any], str]:
    """Writes `table.txt`, `table.csv`, `table.json` and `page.html` to the folder.

    Returns:
        The document of `table.json`, and the text of the table.

    Raises:
        FileError: writing fails.
        FormatError: a record or a log is damaged.
    """
    # Records are read once: another process may finish a cell meanwhile, and the four files must agree.
    table_rows = rows(comparison, grid)
    results = document(comparison, grid, table_rows)
    text = table_text(grid, table_rows)
    files = {
        "table.txt": text + "\n",
        "table.csv": csv_text(table_rows),
        "table.json": json.dumps(results, indent=1, allow_nan=False) + "\n",
        "page.html": page_html(comparison, grid, table_rows, results),
    }
    # After all texts exist, so that an error leaves the old files as they are.
    for name, content in files.items():
        with new_file(comparison.path / name, force=True) as part:
            part.write_text(content, encoding="utf-8")
    return results, text
