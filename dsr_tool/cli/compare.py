"""dsr-tool compare: methods side by side at one budget."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import click

from dsr_tool.cli.common import emit, examples, note, output_options

__all__ = ["command"]


@click.command(
    "compare",
    epilog=examples(
        "dsr-tool compare --recipe lenet-300-100 --methods dsr,set --sparsity .95 --seeds 0-2 --data digits -o digits",
        "dsr-tool compare grid.toml -o lenet --jobs 2 --max-time 3000",
    ),
)
@click.argument("grid", required=False, type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The folder of the comparison.")
@click.option("--recipe", metavar="FAMILY", help="A family of recipes, as `dsr-tool recipes` lists them, or its file.")
@click.option("--methods", metavar="A,B", help="Which of its methods; those that they start from are added.")
@click.option("--sparsity", metavar="S,T", help="Fractions of zeros; default: those of the recipe.")
@click.option("--seeds", metavar="0-4", help="A range or list of seeds; default: 0.")
@click.option("--data", metavar="SPEC", help="As for `dsr-tool train`.")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Change a setting of all cells; repeatable.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Processes, of one thread each.")
@click.option("--max-time", type=float, metavar="S", help="Stop after so many seconds; the same command goes on.")
@click.option(
    "--keep",
    type=click.Choice(["light", "all"]),
    default="light",
    show_default=True,
    help="light: of complete runs without their checkpoint and best epoch.",
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
    """Train every method at every sparsity with every seed, and compare what comes of it.

    What is to be run stands in the file GRID or in the options, which win. Each cell is converted, trained and exported
    as its recipe says, in a run folder of its own. Cells that are complete are kept, those that were cut off go on, and
    those that failed are tried again; several such commands may work on one folder. Without GRID and options, all that
    the folder has is gone on with.

    The folder has the table as table.txt, table.csv and table.json, page.html with charts, and runs/ with a run folder
    for each cell. Exit code 3 if a cell failed; the others are run all the same.
    """
    from dsr_tool.compare.cells import Comparison
    from dsr_tool.compare.grid import make_grid
    from dsr_tool.compare.outputs import write_outputs
    from dsr_tool.compare.work import Order, stopped_by_sigterm, work, work_in_processes
    from dsr_tool.errors import CheckFailed, UsageError

    since, started = time.time(), time.monotonic()
    if max_time is not None and not 0 < max_time < math.inf:
        raise UsageError(f"--max-time {max_time} is not allowed; give seconds, more than 0.")
    comparison = Comparison(output)
    tables, given = _tables(grid, options), _given(sparsity, seeds, sets)
    asked = make_grid(tables, str(grid or "compare"), given) if tables or given else comparison.plan()
    _open_data(asked)
    whole = comparison.add(asked)
    deadline = started + max_time if max_time is not None else math.inf
    order = Order(str(output), tuple(cell.name for cell in asked.cells), since, deadline, light=keep == "light")
    try:
        with stopped_by_sigterm():
            if jobs == 1:
                work(order, lambda line: note(line, quiet=quiet))
            else:
                work_in_processes(order, jobs, quiet=quiet)
    finally:
        document, text = write_outputs(comparison, whole)
    emit(document, text, as_json=as_json)
    return CheckFailed.exit_code if document["counts"]["failed"] else 0


def _tables(grid: Path | None, options: dict[str, str | None]) -> dict[str, Any]:
    """The grid's file, with the options in the place of what stands at its top."""
    from dsr_tool.recipes.files import read_toml

    tables = read_toml(grid, "GRID") if grid else {}
    tables |= {key: value for key, value in options.items() if value is not None}
    if options["methods"] is not None:
        tables["methods"] = [name.strip() for name in options["methods"].split(",")]
    return tables


def _given(sparsity: str | None, seeds: str | None, sets: tuple[str, ...]) -> dict[str, Any]:
    """Options that win over the tables of single methods as well."""
    from dsr_tool.compare.grid import numbers
    from dsr_tool.recipes.apply import pair

    told: dict[str, Any] = {"seeds": seeds, "set": dict(pair(text) for text in sets) or None}
    told["sparsity"] = numbers(sparsity) if sparsity is not None else None
    return {key: value for key, value in told.items() if value is not None}


def _open_data(grid: Any) -> None:
    """Find out that the data is not there before any cell fails for it."""
    from dsr_tool.train.datasets import open_dataset

    open_dataset(grid.data, (3, 32, 32))
