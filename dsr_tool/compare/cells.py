"""Cells of a comparison, and its folder: the plan, a record of each cell, and its run folder."""

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
from dsr_tool.train.datasets import data_name
from dsr_tool.train.lock import Lock

__all__ = ["ARCHIVE", "PLAN", "Cell", "Comparison", "Grid"]

PLAN, ARCHIVE = "compare.json", "model.dsr"
"""Names of the plan in the folder, and of the archive in a run folder."""

# Folders within that of the comparison.
_RUNS, _CELLS = "runs", "cells"
_SCHEMA = "dsr-tool/compare-plan/1"
_PATIENCE_S, _PAUSE_S = 20.0, 0.1
"""Seconds to wait for another process that changes the plan, and seconds between two tries."""


@dataclass(frozen=True)
class Cell:
    """One training of a comparison.

    Attributes:
        name: name of its run folder, such as `dsr@0.95-s0`.
        method: name of the method's table in the recipe.
        sparsity: fraction of zeros; None for a method that has none.
        seed: seed of weights, masks, order of the data and positions.
        recipe: all other settings.
        needs: name of the cell whose run it starts from; None if it starts from nothing.
    """

    name: str
    method: str
    sparsity: float | None
    seed: int
    recipe: Recipe
    needs: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Cell:
        """Returns the object of plain values, the inverse of `to_dict`; raises `KeyError` or `TypeError` otherwise."""
        # The values come from `compare.json`, which users may edit: unknown keys raise TypeError here.
        return cls(**{**values, "recipe": Recipe(**values["recipe"])})


@dataclass(frozen=True)
class Grid:
    """All cells of a comparison.

    Attributes:
        title: title of its family of recipes.
        data: data set, as `load_data` takes it.
        cells: cells in the order in which they run; a cell comes after the one that it starts from.
    """

    title: str
    data: str
    cells: tuple[Cell, ...]

    def merged(self, other: Grid, replaceable: Container[str]) -> Grid:
        """Returns both grids as one.

        Args:
            other: grid to add.
            replaceable: names of cells whose settings may change, because they have no results.

        Raises:
            UsageError: the grids have different data, or different settings of a cell with results.
        """
        # Data may lie in another folder than before, so only its name is compared.
        if self.title != other.title or data_name(self.data) != data_name(other.data):
            raise UsageError(
                f"the comparison in this folder is of {self.title} with data {self.data!r}, not {other.title} with "
                f"{other.data!r}; give another folder."
            )
        mine = {cell.name: cell for cell in self.cells}
        differing = [
            cell.name
            for cell in other.cells
            if cell.name in mine and cell.name not in replaceable and _settings(mine[cell.name]) != _settings(cell)
        ]
        if differing:
            more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
            raise UsageError(
                f"cell {differing[0]}{more} began with other settings; give another folder, or those settings."
            )
        # `|=` keeps the places of the cells that are replaced, and adds the new ones at the end.
        mine |= {cell.name: cell for cell in other.cells if cell.name not in mine or cell.name in replaceable}
        return replace(self, data=other.data, cells=tuple(mine.values()))

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        return {"title": self.title, "data": self.data, "cells": [cell.to_dict() for cell in self.cells]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Grid:
        """Returns the object of plain values, the inverse of `to_dict`; raises `KeyError` or `TypeError` otherwise."""
        return cls(str(values["title"]), str(values["data"]), tuple(Cell.from_dict(cell) for cell in values["cells"]))


def _settings(cell: Cell) -> tuple[str | None, Any]:
    """Returns what must not change once a cell has begun, as JSON returns it: tuples are lists there."""
    tables = (cell.recipe.model, cell.recipe.train, cell.recipe.options)
    return (cell.needs, json.loads(json.dumps(tables)))


class Comparison:
    """Folder of a comparison: `compare.json` (the plan), `cells/` (a record each) and `runs/` (a run folder each).

    Several processes may work in it at the same time.

    Attributes:
        path: path of the folder.
    """

    def __init__(self, path: str | Path) -> None:
        """Takes the path; nothing is read or written yet."""
        self.path = Path(path)

    def run_folder(self, name: str) -> Path:
        """Returns the path of the run folder of a cell."""
        return self.path / _RUNS / name

    def plan(self) -> Grid:
        """Reads the plan: the cells of all calls so far.

        Raises:
            FileError: the folder has no plan.
            FormatError: the plan is damaged.
        """
        file = self.path / PLAN
        try:
            return Grid.from_dict(json.loads(file.read_text(encoding="utf-8")))
        except OSError as error:
            raise FileError(
                f"{str(self.path)!r} is not a comparison: {PLAN} cannot be read ({error.strerror})."
            ) from error
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise FormatError(f"plan {str(file)!r} is invalid ({error}); give another folder.") from error

    def add(self, grid: Grid) -> Grid:
        """Adds the cells of a grid to the plan, and creates the folder if needed.

        Returns:
            The whole plan.

        Raises:
            FileError: the folder holds something else, or writing fails.
            UsageError: the grid contradicts the plan.
        """
        # `force`, because adding to a comparison is no replacement; other folders are refused by the marker.
        refuse_existing(self.path, force=True, marker=PLAN)
        with writing(self.path):
            for folder in (_RUNS, _CELLS):
                (self.path / folder).mkdir(parents=True, exist_ok=True)
        with self._locked():
            whole = self._merged(grid) if (self.path / PLAN).exists() else grid
            # Under the lock, so that no cells of another call are lost, and by rename, because others read at any time.
            document = {"schema": _SCHEMA, **whole.to_dict()}
            with new_file(self.path / PLAN, force=True) as part:
                part.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        return whole

    def _merged(self, grid: Grid) -> Grid:
        """Returns the plan with more cells. Runs of failed cells are removed if their settings have changed."""
        plan = self.plan()
        failed = {cell.name for cell in plan.cells if (self.record(cell.name) or {}).get("status") == "failed"}
        unstarted = {cell.name for cell in plan.cells if not self.run_folder(cell.name).exists()} - failed
        whole = plan.merged(grid, failed | unstarted)
        old = {cell.name: cell for cell in plan.cells}
        for cell in whole.cells:
            if cell.name in failed and _settings(old[cell.name]) != _settings(cell):
                shutil.rmtree(self.run_folder(cell.name), ignore_errors=True)
        return whole

    def record(self, name: str) -> dict[str, Any] | None:
        """Reads the record of a cell: `status` (`complete`, `failed` or `paused`) and figures; None if it has none.

        Raises:
            FormatError: the record is damaged.
        """
        file = self.path / _CELLS / f"{name}.json"
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(record, dict) or record.get("status") not in ("complete", "failed", "paused"):
                raise ValueError("it has no status")
        except FileNotFoundError:
            return None  # not begun, or interrupted before its end
        except (ValueError, RecursionError) as error:
            raise FormatError(f"record {str(file)!r} is invalid ({error}); delete it to run the cell again.") from error
        return record

    def write_record(self, name: str, record: Mapping[str, Any]) -> None:
        """Writes the record of a cell."""
        with new_file(self.path / _CELLS / f"{name}.json", force=True) as part:
            part.write_text(json.dumps(dict(record), indent=1, allow_nan=False) + "\n", encoding="utf-8")

    def try_lock(self, name: str) -> Lock | None:
        """Locks a cell until the lock is released or this process ends; returns None if another process has it."""
        file = self.path / _CELLS / f"{name}.lock"
        file.touch()  # a lock needs a file that stays: removing it would let two processes lock two files of one name
        try:
            return Lock(file)
        except FileError:  # locked
            return None

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Waits until no other process changes the plan, and keeps others from changing it within."""
        give_up = time.monotonic() + _PATIENCE_S
        while (lock := self.try_lock("plan")) is None:
            if time.monotonic() > give_up:
                raise FileError(f"{str(self.path)!r} is locked by another process; wait for its end, or end it.")
            time.sleep(_PAUSE_S)
        try:
            yield
        finally:
            lock.release()
