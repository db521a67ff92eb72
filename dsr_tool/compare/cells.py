"""Cells of a comparison, and the folder that holds them: the plan, what became of each cell, and its run."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dsr_tool.errors import FileError, FormatError, UsageError
from dsr_tool.files import new_file, refuse_existing, writing
from dsr_tool.recipes.recipe import Recipe
from dsr_tool.train.lock import Lock

__all__ = ["ARCHIVE", "PLAN", "Cell", "Comparison", "Grid"]

PLAN, ARCHIVE = "compare.json", "model.dsr"
_RUNS, _CELLS = "runs", "cells"
_SCHEMA = "dsr-tool/compare-plan/1"
_PATIENCE_S, _PAUSE_S = 20.0, 0.1


@dataclass(frozen=True)
class Cell:
    """One training.

    Attributes:
        name: of its folder, such as `dsr@0.95-s0`.
        method: name of the method's table in the recipe.
        sparsity: None for a method that has none.
        seed: of weights, masks, order and positions.
        recipe: everything else.
        needs: name of the cell whose run it starts from, if any.
    """

    name: str
    method: str
    sparsity: float | None
    seed: int
    recipe: Recipe
    needs: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Cell:
        """The inverse of `to_dict`; raises `KeyError` or `TypeError` for anything else."""
        return cls(**{**values, "recipe": Recipe(**values["recipe"])})


@dataclass(frozen=True)
class Grid:
    """All cells of a comparison, those that others start from before them.

    Attributes:
        title: of its family of recipes.
        data: for `load_data`.
        cells: in the order in which they are run.
    """

    title: str
    data: str
    cells: tuple[Cell, ...]

    def with_more(self, other: Grid, free: Container[str]) -> Grid:
        """Both grids as one.

        Args:
            other: what to add.
            free: names of cells of which nothing is left that other settings would contradict.

        Raises:
            UsageError: they are on different data, or disagree about a cell that is not free.
        """
        if self.title != other.title or self.data.partition(":")[0] != other.data.partition(":")[0]:
            raise UsageError(
                f"the comparison there is of {self.title} with data {self.data!r}, not {other.title} with "
                f"{other.data!r}; give another folder."
            )
        mine = {cell.name: cell for cell in self.cells}
        differing = [
            cell.name
            for cell in other.cells
            if cell.name in mine and cell.name not in free and _told(mine[cell.name]) != _told(cell)
        ]
        if differing:
            more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
            raise UsageError(
                f"cell {differing[0]}{more} began with other settings; give another folder, or those settings."
            )
        mine |= {cell.name: cell for cell in other.cells if cell.name not in mine or cell.name in free}
        return replace(self, data=other.data, cells=tuple(mine.values()))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"title": self.title, "data": self.data, "cells": [cell.to_dict() for cell in self.cells]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Grid:
        """The inverse of `to_dict`; raises `KeyError` or `TypeError` for anything else."""
        return cls(str(values["title"]), str(values["data"]), tuple(Cell.from_dict(cell) for cell in values["cells"]))


def _told(cell: Cell) -> tuple[Any, ...]:
    """What makes a cell what it is, as JSON gives it back."""
    tables = (cell.recipe.model, cell.recipe.train, cell.recipe.options)
    return (cell.needs, json.loads(json.dumps(tables)))


class Comparison:
    """A folder with `compare.json` (the plan), `cells/` (what became of each), and `runs/` (a run folder each).

    Several processes may work in one at a time.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: str | Path) -> None:
        """Nothing is read or written yet."""
        self.path = Path(path)

    def run(self, name: str) -> Path:
        """The run folder of a cell."""
        return self.path / _RUNS / name

    def plan(self) -> Grid:
        """The cells of all calls so far.

        Raises:
            FileError: no comparison is there.
            FormatError: its plan is damaged.
        """
        file = self.path / PLAN
        try:
            return Grid.from_dict(json.loads(file.read_text(encoding="utf-8")))
        except OSError as error:
            raise FileError(
                f"{str(self.path)!r} is no comparison: {PLAN} cannot be read ({error.strerror})."
            ) from error
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise FormatError(f"comparison {str(file)!r} is not understood ({error}); give another folder.") from error

    def add(self, grid: Grid) -> Grid:
        """Take the cells of a grid into the plan; the whole plan.

        Raises:
            FileError: the folder holds something else, or the disk refuses it.
            UsageError: the grid disagrees with what is there already.
        """
        refuse_existing(self.path, force=True, marker=PLAN)
        with writing(self.path):
            for folder in (_RUNS, _CELLS):
                (self.path / folder).mkdir(parents=True, exist_ok=True)
        with self._alone():
            whole = self._merged(grid) if (self.path / PLAN).exists() else grid
            document = {"schema": _SCHEMA, **whole.to_dict()}
            with new_file(self.path / PLAN, force=True) as part:
                part.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        return whole

    def _merged(self, grid: Grid) -> Grid:
        """The plan with more cells; what failed is begun anew where its settings are other ones now."""
        plan = self.plan()
        failed = {cell.name for cell in plan.cells if (self.record(cell.name) or {}).get("status") == "failed"}
        unborn = {cell.name for cell in plan.cells if not self.run(cell.name).exists()} - failed
        whole = plan.with_more(grid, failed | unborn)
        old = {cell.name: cell for cell in plan.cells}
        for cell in whole.cells:
            if cell.name in failed and _told(old[cell.name]) != _told(cell):
                shutil.rmtree(self.run(cell.name), ignore_errors=True)
        return whole

    def record(self, name: str) -> dict[str, Any] | None:
        """What became of a cell: `status` (`complete`, `failed` or `paused`) and figures; None for nothing yet.

        Raises:
            FormatError: the record is damaged.
        """
        file = self.path / _CELLS / f"{name}.json"
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(record, dict) or record.get("status") not in ("complete", "failed", "paused"):
                raise ValueError("no status")
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError) as error:
            raise FormatError(
                f"record {str(file)!r} is not understood ({error}); delete it to run that again."
            ) from error
        return record

    def note(self, name: str, record: Mapping[str, Any]) -> None:
        """Write what became of a cell."""
        with new_file(self.path / _CELLS / f"{name}.json", force=True) as part:
            part.write_text(json.dumps(dict(record), indent=1, allow_nan=False) + "\n", encoding="utf-8")

    def take(self, name: str) -> Lock | None:
        """Keep other processes from a cell until the lock is released or this process ends; None where one has it."""
        file = self.path / _CELLS / f"{name}.lock"
        file.touch()
        try:
            return Lock(file)
        except FileError:
            return None

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Wait for others who are changing the plan."""
        give_up = time.monotonic() + _PATIENCE_S
        while (lock := self.take("plan")) is None:
            if time.monotonic() > give_up:
                raise FileError(f"{str(self.path)!r} is held by another process; wait for its end, or end it.")
            time.sleep(_PAUSE_S)
        try:
            yield
        finally:
            lock.release()
