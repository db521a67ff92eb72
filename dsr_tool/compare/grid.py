"""Grid: which methods at which sparsities with which seeds, and the cells that this comes to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dsr_tool.compare.cells import Cell, Grid
from dsr_tool.core.recipe_files import find_family
from dsr_tool.core.recipes import Family, Recipe, toml_value
from dsr_tool.errors import DsrError, UsageError, unknown_name
from dsr_tool.train.recipes import changed

__all__ = ["KEYS", "make_grid", "numbers", "seeds"]

KEYS = ("recipe", "data", "methods", "sparsity", "seeds", "set", "method")
"""What a grid file may have at its top."""
_OF_METHOD = ("sparsity", "seeds", "set")
_VARIED = ("method", "sparsity", "arch", "seed", "from", "structure", "final_sparsity")
"""Settings that make a cell what it is, and cannot be set for it."""
_MOST_SEEDS = 1000


def make_grid(tables: Mapping[str, Any], origin: str) -> Grid:
    """The grid that a file or options describe.

    Args:
        tables: `recipe` (a family), `data`, `methods`, `sparsity`, `seeds` (a number of them, a list, or `0-4`) and
            `set`; a table `method.NAME` with `sparsity`, `seeds` and `set` holds for that method alone.
        origin: for messages.

    Raises:
        UsageError: keys or values that are not allowed; all of them are listed.
    """
    errors = [str(unknown_name("key", key, KEYS)) for key in tables if key not in KEYS]
    errors += [f"{key} is missing." for key in ("recipe", "data") if not isinstance(tables.get(key), str)]
    of_method = tables.get("method", {})
    if not isinstance(of_method, Mapping) or not all(isinstance(own, Mapping) for own in of_method.values()):
        errors.append(f"method is {of_method!r}, and should hold one table for each method.")
        of_method = {}
    family = _family(tables.get("recipe"), errors)
    cells: dict[str, Cell] = {}
    if family is not None:
        methods = tables.get("methods", list(of_method))
        for method in _methods(methods, family, errors):
            own = of_method.get(method, {})
            errors += [
                str(unknown_name("key", f"method.{method}.{key}", _OF_METHOD)) for key in own if key not in _OF_METHOD
            ]
            wanted = {**{key: tables[key] for key in _OF_METHOD if key in tables}, **own}
            sets = _sets({**_table(tables.get("set")), **_table(own.get("set"))}, method, errors)
            for cell in _cells(family, method, wanted, sets, errors):
                cells.setdefault(cell.name, cell)
        for cell in list(cells.values()):
            _add_needed(cell, cells, family, tables, errors)
    if errors or family is None:
        raise UsageError(f"{origin}: {' '.join(dict.fromkeys(errors))}")
    return Grid(family.title or family.name, tables["data"], tuple(_ordered(cells)))


def numbers(text: str) -> list[float]:
    """Numbers with commas between them, such as `.95,.98`; raises `UsageError` for anything else."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"{text!r} is not a list of numbers; write it as 0.9,0.95.") from error


def seeds(value: Any) -> list[int]:
    """Seeds from their number, a list, or text such as `0-4` or `0,2,5-7`; raises `UsageError` for anything else."""
    wrong = UsageError(
        f"seeds {value!r} is not allowed; give a number of seeds, a list of them, or a range such as '0-4'."
    )
    if isinstance(value, bool):
        raise wrong
    if isinstance(value, int):
        value = list(range(value)) if 0 < value <= _MOST_SEEDS else None
    if isinstance(value, str):
        value = _ranges(value)
    if not isinstance(value, list) or not value:
        raise wrong
    if not all(isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 1 << 63 for seed in value):
        raise wrong
    return value


def _ranges(text: str) -> list[int] | None:
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        try:
            low, high = int(first), int(last or first)
        except ValueError:
            return None
        if not low <= high < low + _MOST_SEEDS:
            return None
        found += range(low, high + 1)
    return found


def _family(name: Any, errors: list[str]) -> Family | None:
    if not isinstance(name, str):
        return None
    try:
        return find_family(name)
    except DsrError as error:
        errors.append(str(error))
        return None


def _methods(wanted: Any, family: Family, errors: list[str]) -> Iterator[str]:
    """The methods of the grid that the family has."""
    if not isinstance(wanted, list) or not wanted:
        errors.append(f"methods is {wanted!r}, and should be a list of names: {', '.join(family.methods)}.")
        return
    for i, name in enumerate(wanted):
        if name in wanted[:i]:
            errors.append(f"method {name!r} is there twice; name it once.")
        elif name not in family.methods:
            errors.append(str(unknown_name("method", str(name), family.methods)))
        else:
            yield name


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _sets(values: Mapping[str, Any], method: str, errors: list[str]) -> list[str]:
    """Values to set as `key=value`."""
    varied = [key for key in values if key.rpartition(".")[2] in _VARIED]
    errors += [f"set {key} of method {method} is what the grid varies; leave it out." for key in varied]
    return [f"{key}={toml_value(value)}" for key, value in values.items() if key not in varied]


def _cells(
    family: Family, method: str, wanted: Mapping[str, Any], sets: Sequence[str], errors: list[str]
) -> Iterator[Cell]:
    """The cells of one method; what is wrong with them is added to `errors`."""
    try:
        chosen = seeds(wanted.get("seeds", 1))
        sparsities = _sparsities(wanted.get("sparsity"), family) if family.takes_sparsity(method) else [None]
        for name, values in (("seed", chosen), ("sparsity", sparsities)):
            if len(set(values)) < len(values):
                twice = next(value for i, value in enumerate(values) if value in values[:i])
                raise UsageError(f"{name} {twice} of method {method} is there twice; give it once.")
        for sparsity in sparsities:
            recipe = changed(family.row(method, sparsity), sets)
            for seed in chosen:
                yield _cell(method, sparsity, seed, recipe)
    except DsrError as error:
        errors.append(str(error))


def _sparsities(value: Any, family: Family) -> list[float | None]:
    value = list(family.sparsities) if value is None else value
    value = value if isinstance(value, list) else [value]
    for one in value:
        if isinstance(one, bool) or not isinstance(one, (int, float)) or not 0 <= one < 1:
            raise UsageError(f"sparsity {one!r} is not allowed; give fractions of zeros, in [0, 1).")
    return [float(one) for one in value]


def _cell(method: str, sparsity: float | None, seed: int, recipe: Recipe) -> Cell:
    return Cell(_name(method, sparsity, seed), method, sparsity, seed, recipe)


def _name(method: str, sparsity: float | None, seed: int) -> str:
    return f"{method}-s{seed}" if sparsity is None else f"{method}@{sparsity:g}-s{seed}"


def _add_needed(
    cell: Cell, cells: dict[str, Cell], family: Family, tables: Mapping[str, Any], errors: list[str]
) -> None:
    """Note which cell another starts from, the same seed of another method, and add it where it is not there."""
    start = cell.recipe.after
    if start is None:
        return
    if start not in family.methods:
        errors.append(f"method {cell.method} starts from {start!r}, which the recipe does not have.")
        return
    sparsity = cell.sparsity if family.takes_sparsity(start) else None
    name = _name(start, sparsity, cell.seed)
    cells[cell.name] = replace(cell, needs=name)
    if name in cells:
        return
    own = _table(_table(tables.get("method")).get(start))
    sets = _sets({**_table(tables.get("set")), **_table(own.get("set"))}, start, errors)
    try:
        cells[name] = _cell(start, sparsity, cell.seed, changed(family.row(start, sparsity), sets))
    except DsrError as error:
        errors.append(str(error))
        return
    _add_needed(cells[name], cells, family, tables, errors)


def _ordered(cells: Mapping[str, Cell]) -> Iterator[Cell]:
    """Cells in their order, those that others start from first; seed by seed, so that a part of all is there early."""
    depth = {name: _depth(cell, cells) for name, cell in cells.items()}
    yield from sorted(cells.values(), key=lambda cell: (depth[cell.name], cell.seed))


def _depth(cell: Cell, cells: Mapping[str, Cell], seen: tuple[str, ...] = ()) -> int:
    if cell.name in seen:
        raise UsageError(f"method {cell.method} starts from itself, by way of {', '.join(seen)}; correct the recipe.")
    return 0 if cell.needs is None else 1 + _depth(cells[cell.needs], cells, (*seen, cell.name))
