"""Turns the description of a grid (methods, sparsities, seeds, settings) into cells, one for each training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from dsr_tool.compare.cells import Cell, Grid
from dsr_tool.compare.grid_values import parse_seeds, parse_sparsities, table_or_empty, wrong_keys
from dsr_tool.errors import DsrError, UsageError, unknown_name
from dsr_tool.recipes.apply import override
from dsr_tool.recipes.files import find_family
from dsr_tool.recipes.recipe import Family, toml_value

__all__ = ["make_grid"]

_VARIED = ("method", "sparsity", "arch", "seed", "from", "structure", "final_sparsity")
"""Settings that distinguish cells or come from the recipe's tables, and which `set` therefore cannot replace."""

_Value = TypeVar("_Value", int, float)


def make_grid(tables: Mapping[str, Any], origin: str, overrides: Mapping[str, Any] | None = None) -> Grid:
    """Returns the grid that a file or options describe.

    Args:
        tables: `recipe` (a family), `data`, `methods`, `sparsity`, `seeds` (a number of them, a list, or `0-4`) and
            `set`. A table `method.NAME` with `sparsity`, `seeds` and `set` overrides them for that method.
        origin: name of the file or command, for messages.
        overrides: `sparsity`, `seeds` and `set` that override all of these.

    Raises:
        UsageError: keys or values are not allowed; the message lists all of them.
    """
    errors = [*wrong_keys(tables)]
    family = _family(tables.get("recipe"), errors)
    cells: dict[str, Cell] = {}
    if family is not None:
        description = _Description(family, tables, overrides or {}, errors)
        own = table_or_empty(tables.get("method"))
        unknown = [name for name in own if name not in family.methods]
        # A misspelt table would otherwise be ignored, and the method would train with other settings than meant.
        errors += [str(unknown_name("table method of", name, family.methods)) for name in unknown]
        default = [name for name in own if name not in unknown]
        for method in _methods(tables.get("methods", default), family, errors):
            for cell in description.cells(method):
                cells.setdefault(cell.name, cell)
        # A copy of the list, because cells that others start from are added on the way.
        for cell in list(cells.values()):
            _add_start(cell, cells, description)
    if errors or family is None:
        # Each once: a wrong setting of the grid is wrong for every method.
        raise UsageError(f"{origin}: {' '.join(dict.fromkeys(errors))}")
    return Grid(family.title or family.name, tables["data"], tuple(_ordered(cells)))


def _family(name: object, errors: list[str]) -> Family | None:
    """Returns the family of recipes of this name or path; None, and an error in the list, if there is none."""
    if not isinstance(name, str):
        return None
    try:
        return find_family(name)
    except DsrError as error:
        errors.append(str(error))
        return None


def _methods(wanted: object, family: Family, errors: list[str]) -> Iterator[str]:
    """Yields the methods of the grid that the family has; adds the others to the errors."""
    if not isinstance(wanted, list) or not wanted:
        errors.append(f"methods is {wanted!r}, expected a list of names: {', '.join(family.methods)}.")
        return
    for i, name in enumerate(wanted):
        if name in wanted[:i]:
            errors.append(f"method {name!r} is listed twice; list it once.")
        elif name not in family.methods:
            errors.append(str(unknown_name("method", str(name), family.methods)))
        else:
            yield name


@dataclass(frozen=True)
class _Description:
    """Description of a grid. For each method the table of the method overrides the file, and options override both.

    Attributes:
        family: the family of recipes.
        tables: content of the file.
        overrides: options of the command.
        errors: sentences about what is wrong, to which methods add.
    """

    family: Family
    tables: Mapping[str, Any]
    overrides: Mapping[str, Any]
    errors: list[str]

    def _layers(self, method: str) -> tuple[Mapping[str, Any], ...]:
        """Returns the tables that apply to a method; later ones override earlier ones."""
        return (self.tables, table_or_empty(table_or_empty(self.tables.get("method")).get(method)), self.overrides)

    def settings(self, method: str) -> list[str]:
        """Returns the settings of a method as `key=value`; adds those that the grid varies to the errors."""
        pairs = [pair for layer in self._layers(method) for pair in table_or_empty(layer.get("set")).items()]
        varied = dict.fromkeys(key for key, _ in pairs if key.rpartition(".")[2] in _VARIED)
        self.errors.extend(f"set {key} of method {method} is varied by the grid; remove it." for key in varied)
        # As a list in the order of the layers, not as a dict: `epochs` and `train.epochs` are one key.
        return [f"{key}={toml_value(value)}" for key, value in pairs if key not in varied]

    def cells(self, method: str) -> Iterator[Cell]:
        """Yields the cells of one method; adds everything that is wrong with them to the errors."""
        settings = self.settings(method)
        wanted = {key: value for layer in self._layers(method) for key, value in layer.items()}
        chosen = self._checked("seed", method, lambda: parse_seeds(wanted.get("seeds", 1)))
        sparsities: Sequence[float | None] = [None]
        if self.family.has_sparsities(method):
            listed = wanted.get("sparsity")
            sparsities = self._checked("sparsity", method, lambda: parse_sparsities(listed, self.family))
        # If all sparsities are wrong, check the settings at one of the family.
        for sparsity in sparsities or self.family.sparsities[:1]:
            try:
                recipe = override(self.family.row(method, sparsity), settings)
            except DsrError as error:
                self.errors.append(str(error))
                continue
            for seed in chosen:
                yield Cell(_name(method, sparsity, seed), method, sparsity, seed, recipe)

    def _checked(self, name: str, method: str, parse: Callable[[], list[_Value]]) -> list[_Value]:
        """Returns parsed values, each of which may appear once; on an error adds it and returns none."""
        try:
            values = parse()
            if len(set(values)) < len(values):
                twice = next(value for i, value in enumerate(values) if value in values[:i])
                raise UsageError(f"{name} {twice} of method {method} is listed twice; list it once.")
        except DsrError as error:
            self.errors.append(str(error))
            return []
        return values


def _name(method: str, sparsity: float | None, seed: int) -> str:
    """Returns the name of a cell, which is also that of its run folder."""
    return f"{method}-s{seed}" if sparsity is None else f"{method}@{sparsity:g}-s{seed}"


def _add_start(cell: Cell, cells: dict[str, Cell], description: _Description) -> None:
    """Sets the cell that another one starts from, with the same seed, and adds it if the grid does not have it."""
    start = cell.recipe.after
    if start is None:
        return
    if start not in description.family.methods:
        description.errors.append(f"method {cell.method} starts from {start!r}, which the recipe does not have.")
        return
    # `dense` has no sparsity: one run of it serves all sparsities of the methods that start from it.
    sparsity = cell.sparsity if description.family.has_sparsities(start) else None
    name = _name(start, sparsity, cell.seed)
    cells[cell.name] = replace(cell, needs=name)
    # It may be in the grid already, as a method of its own or for another cell.
    if name in cells:
        return
    try:
        recipe = override(description.family.row(start, sparsity), description.settings(start))
        cells[name] = Cell(name, start, sparsity, cell.seed, recipe)
    except DsrError as error:
        description.errors.append(str(error))
        return
    # A start may start from another one in turn.
    _add_start(cells[name], cells, description)


def _ordered(cells: Mapping[str, Cell]) -> Iterator[Cell]:
    """Yields cells seed by seed, so that all methods have a result early, after the cells that they start from."""
    depth = {name: _depth(cell, cells) for name, cell in cells.items()}
    yield from sorted(cells.values(), key=lambda cell: (depth[cell.name], cell.seed))


def _depth(cell: Cell, cells: Mapping[str, Cell], seen: tuple[str, ...] = ()) -> int:
    """Returns the number of cells that must be complete before a cell can start."""
    if cell.name in seen:
        raise UsageError(f"method {cell.method} starts from itself through {', '.join(seen)}; correct the recipe.")
    return 0 if cell.needs is None else 1 + _depth(cells[cell.needs], cells, (*seen, cell.name))
