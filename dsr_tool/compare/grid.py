"""Grid: which methods at which sparsities with which seeds, and the cells that this comes to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from dsr_tool.compare.cells import Cell, Grid
from dsr_tool.errors import DsrError, UsageError, unknown_name
from dsr_tool.recipes.apply import override
from dsr_tool.recipes.files import find_family
from dsr_tool.recipes.recipe import Family, toml_value

__all__ = ["KEYS", "make_grid", "numbers", "seeds"]

KEYS = ("recipe", "data", "methods", "sparsity", "seeds", "set", "method")
"""What a grid file may have at its top."""
_OF_METHOD = ("sparsity", "seeds", "set")
_VARIED = ("method", "sparsity", "arch", "seed", "from", "structure", "final_sparsity")
"""Settings that make a cell what it is, and cannot be set for it."""
_MOST_SEEDS = 1000

_Value = TypeVar("_Value", int, float)


def make_grid(tables: Mapping[str, Any], origin: str, given: Mapping[str, Any] | None = None) -> Grid:
    """The grid that a file or options describe.

    Args:
        tables: `recipe` (a family), `data`, `methods`, `sparsity`, `seeds` (a number of them, a list, or `0-4`) and
            `set`; a table `method.NAME` with `sparsity`, `seeds` and `set` holds for that method alone.
        origin: for messages.
        given: `sparsity`, `seeds` and `set` that win over all of these.

    Raises:
        UsageError: keys or values that are not allowed; all of them are listed.
    """
    errors = [*_wrong_keys(tables)]
    family = _family(tables.get("recipe"), errors)
    cells: dict[str, Cell] = {}
    if family is not None:
        asked = _Asked(family, tables, given or {}, errors)
        own = _table(tables.get("method"))
        strangers = [name for name in own if name not in family.methods]
        errors += [str(unknown_name("table method of", name, family.methods)) for name in strangers]
        for method in _methods(tables.get("methods", [name for name in own if name not in strangers]), family, errors):
            for cell in asked.cells(method):
                cells.setdefault(cell.name, cell)
        for cell in list(cells.values()):
            _add_needed(cell, cells, asked)
    if errors or family is None:
        raise UsageError(f"{origin}: {' '.join(dict.fromkeys(errors))}")
    return Grid(family.title or family.name, tables["data"], tuple(_ordered(cells)))


def _wrong_keys(tables: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for every key that is not allowed, and every table that is none."""
    yield from (str(unknown_name("key", key, KEYS)) for key in tables if key not in KEYS)
    for key in ("recipe", "data"):
        if not isinstance(tables.get(key), str):
            yield f"{key} is {tables[key]!r}, and should be a text." if key in tables else f"{key} is missing."
    if "set" in tables and not isinstance(tables["set"], Mapping):
        yield f"set is {tables['set']!r}, and should be a table of settings."
    of_method = tables.get("method", {})
    if not isinstance(of_method, Mapping) or not all(isinstance(own, Mapping) for own in of_method.values()):
        yield f"method is {of_method!r}, and should hold one table for each method."
        return
    for method, own in of_method.items():
        yield from (
            str(unknown_name("key", f"method.{method}.{key}", [f"method.{method}.{known}" for known in _OF_METHOD]))
            for key in own
            if key not in _OF_METHOD
        )
        if "set" in own and not isinstance(own["set"], Mapping):
            yield f"method.{method}.set is {own['set']!r}, and should be a table of settings."


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


@dataclass(frozen=True)
class _Asked:
    """What is to be run of a family: by the file, by its table of a method, and by the options, each over the last."""

    family: Family
    tables: Mapping[str, Any]
    given: Mapping[str, Any]
    errors: list[str]

    def _layers(self, method: str) -> tuple[Mapping[str, Any], ...]:
        return (self.tables, _table(_table(self.tables.get("method")).get(method)), self.given)

    def sets(self, method: str) -> list[str]:
        """What is set for a method as `key=value`; what cannot be is added to the errors."""
        pairs = [pair for layer in self._layers(method) for pair in _table(layer.get("set")).items()]
        varied = dict.fromkeys(key for key, _ in pairs if key.rpartition(".")[2] in _VARIED)
        self.errors.extend(f"set {key} of method {method} is what the grid varies; leave it out." for key in varied)
        # In the order of the layers: a key may be written with its table, and without it.
        return [f"{key}={toml_value(value)}" for key, value in pairs if key not in varied]

    def cells(self, method: str) -> Iterator[Cell]:
        """The cells of one method; everything that is wrong with them is added to the errors."""
        sets = self.sets(method)
        wanted = {key: value for layer in self._layers(method) for key, value in layer.items()}
        takes = self.family.has_sparsities(method)
        chosen = self._checked("seed", method, lambda: seeds(wanted.get("seeds", 1)))
        sparsities: Sequence[float | None] = [None]
        if takes:
            sparsities = self._checked("sparsity", method, lambda: _sparsities(wanted.get("sparsity"), self.family))
        # Settings are looked at even where no sparsity is left to run them at.
        for sparsity in sparsities or self.family.sparsities[:1]:
            try:
                recipe = override(self.family.row(method, sparsity), sets)
            except DsrError as error:
                self.errors.append(str(error))
                continue
            for seed in chosen:
                yield Cell(_name(method, sparsity, seed), method, sparsity, seed, recipe)

    def _checked(self, name: str, method: str, read: Callable[[], list[_Value]]) -> list[_Value]:
        """Values that are allowed, each once; none where they are not, which is added to the errors."""
        try:
            values = read()
            if len(set(values)) < len(values):
                twice = next(value for i, value in enumerate(values) if value in values[:i])
                raise UsageError(f"{name} {twice} of method {method} is there twice; give it once.")
        except DsrError as error:
            self.errors.append(str(error))
            return []
        return values


def _sparsities(value: Any, family: Family) -> list[float]:
    value = list(family.sparsities) if value is None else value
    value = value if isinstance(value, list) else [value]
    for one in value:
        if isinstance(one, bool) or not isinstance(one, (int, float)) or not 0 <= one < 1:
            raise UsageError(f"sparsity {one!r} is not allowed; give fractions of zeros, in [0, 1).")
    return [float(one) for one in value]


def _name(method: str, sparsity: float | None, seed: int) -> str:
    return f"{method}-s{seed}" if sparsity is None else f"{method}@{sparsity:g}-s{seed}"


def _add_needed(cell: Cell, cells: dict[str, Cell], asked: _Asked) -> None:
    """Note which cell another starts from, the same seed of another method, and add it where it is not there."""
    start = cell.recipe.after
    if start is None:
        return
    if start not in asked.family.methods:
        asked.errors.append(f"method {cell.method} starts from {start!r}, which the recipe does not have.")
        return
    sparsity = cell.sparsity if asked.family.has_sparsities(start) else None
    name = _name(start, sparsity, cell.seed)
    cells[cell.name] = replace(cell, needs=name)
    if name in cells:
        return
    try:
        recipe = override(asked.family.row(start, sparsity), asked.sets(start))
        cells[name] = Cell(name, start, sparsity, cell.seed, recipe)
    except DsrError as error:
        asked.errors.append(str(error))
        return
    _add_needed(cells[name], cells, asked)


def _ordered(cells: Mapping[str, Cell]) -> Iterator[Cell]:
    """Cells in their order, those that others start from first; seed by seed, so that a part of all is there early."""
    depth = {name: _depth(cell, cells) for name, cell in cells.items()}
    yield from sorted(cells.values(), key=lambda cell: (depth[cell.name], cell.seed))


def _depth(cell: Cell, cells: Mapping[str, Cell], seen: tuple[str, ...] = ()) -> int:
    if cell.name in seen:
        raise UsageError(f"method {cell.method} starts from itself, by way of {', '.join(seen)}; correct the recipe.")
    return 0 if cell.needs is None else 1 + _depth(cells[cell.needs], cells, (*seen, cell.name))
