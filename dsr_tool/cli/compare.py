"""dsr-tool compare: train methods side by side at one budget."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsr_tool.cli.common import FilePath, emit, examples, note, output_options

if TYPE_CHECKING:
    from dsr_tool.compare.cells import Grid

__all__ = ["command"]


@click.command(
    "compare",
    epilog=examples(
        "dsr-tool compare --recipe lenet-300-100 --methods dsr,set --sparsity .95 --seeds 0-2 --data digits -o digits",
        "dsr-tool compare grid.toml -o lenet --jobs 2 --max-time 3000",
    ),
)
@click.argument("grid", required=False, type=FilePath())
@click.option("-o", "--output", required=True, type=FilePath(), help="The comparison's folder.")
@click.option("--recipe", metavar="FAMILY", help="Family of recipes: one that `dsr-tool recipes` lists, or a file.")
@click.option("--methods", metavar="A,B", help="Methods of the family; those that they start from are added.")
@click.option("--sparsity", metavar="S,T", help="Fractions of zeros; default: those of the family.")
@click.option("--seeds", metavar="0-4", help="Range or list of seeds; default: 0.")
@click.option("--data", metavar="SPEC", help="Data set, as for `dsr-tool train`.")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Change a setting of every cell; repeatable.")
@click.option(
    "--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Processes, with one thread each."
)
@click.option("--max-time", type=float, metavar="S", help="Stop after this many seconds; the same command continues.")
@click.option(
    "--keep",
    type=click.Choice(["light", "all"]),
    default="light",
    show_default=True,
    help="light: delete checkpoint and best epoch of complete runs; all: keep them.",
)
@output_options
def command(
    grid: Path | None,
    output: Path,
    jobs: int,
    max_time: float | None,
    keep: str,
    sparsity: str | None,
    seeds: str | None,
    sets: tuple[str, ...],
    as_json: bool,
    quiet: bool,
    **options: str | None,
) -> int:
    """Train every method at every sparsity with every seed, and compare the results.

    The file GRID says what to run; options replace its entries. Each cell is converted, trained and exported by its
    recipe, in its own run folder. Complete cells are skipped, interrupted ones resume, and failed ones are tried again.
    Several such commands may work on one folder. Without GRID and options, the cells that the folder has are run.

    The folder gets the table as table.txt, table.csv and table.json, page.html with charts, and runs/ with the run
    folder of each cell. Exit code 3 if a cell failed; the others are run nevertheless.
    """
    from dsr_tool.compare.cells import Comparison
    from dsr_tool.compare.grid import make_grid
    from dsr_tool.compare.outputs import write_outputs
    from dsr_tool.compare.work import Order, stopped_by_sigterm, work, work_in_processes
    from dsr_tool.errors import CheckFailed, UsageError

    # Cells that failed before `since` are tried again; the monotonic clock measures --max-time.
    since, started = time.time(), time.monotonic()
    if max_time is not None and not 0 < max_time < math.inf:
        raise UsageError(f"--max-time {max_time} is not allowed; give a positive number of seconds.")
    comparison = Comparison(output)
    tables, given = _read_tables(grid, options), _parse_overrides(sparsity, seeds, sets)
    if given or tables.keys() - {"data"}:
        asked = make_grid(tables, str(grid or "compare"), given)
    else:
        asked = replace(comparison.plan(), **tables)
    _require_data(asked, options["data"])
    whole = comparison.add(asked)
    deadline = started + max_time if max_time is not None else math.inf
    names = tuple(cell.name for cell in asked.cells)
    order = Order(str(output), names, since, deadline, light=keep == "light", data=asked.data)
    try:
        with stopped_by_sigterm():
            if jobs == 1:
                work(order, lambda line: note(line, quiet=quiet))
            else:
                work_in_processes(order, jobs, quiet=quiet)
    finally:  # a comparison that is interrupted has a table of what is complete
        document, text = write_outputs(comparison, whole)
    emit(document, text, as_json=as_json)
    return CheckFailed.exit_code if document["counts"]["failed"] else 0


def _read_tables(grid: Path | None, options: dict[str, str | None]) -> dict[str, Any]:
    """Returns the tables of the file GRID, with options in place of its top-level entries."""
    from dsr_tool.recipes.files import read_toml

    tables = read_toml(grid, "GRID") if grid else {}
    tables |= {key: value for key, value in options.items() if value is not None}
    if options["methods"] is not None:
        tables["methods"] = [name.strip() for name in options["methods"].split(",")]
    return tables


def _parse_overrides(sparsity: str | None, seeds: str | None, sets: tuple[str, ...]) -> dict[str, Any]:
    """Returns the options that replace entries of the tables of single methods too."""
    from dsr_tool.compare.grid_values import parse_numbers
    from dsr_tool.recipes.apply import parse_assignment

    overrides: dict[str, Any] = {"seeds": seeds, "set": dict(parse_assignment(text) for text in sets) or None}
    overrides["sparsity"] = parse_numbers(sparsity) if sparsity is not None else None
    return {key: value for key, value in overrides.items() if value is not None}


def _require_data(grid: Grid, typed: str | None) -> None:
    """Opens the data, so that missing data is one error before the first cell, not one in every cell.

    Data that are code must be typed: neither a grid nor the plan of a comparison, which are files, may name them alone.
    """
    from dsr_tool.errors import UsageError
    from dsr_tool.train.datasets import names_code, open_dataset

    if names_code(grid.data) and typed != grid.data:
        raise UsageError(
            f"the grid or the folder has data {grid.data!r}, code that no file may name to be run; if you trust it, "
            f"give --data {grid.data} yourself."
        )
    open_dataset(grid.data, (3, 32, 32))
