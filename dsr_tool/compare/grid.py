"""Turns the description of a grid (methods, sparsities, seeds, settings) into cells, one for each training."""

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
"""Keys at the top of a grid file."""

_METHOD_KEYS = ("sparsity", "seeds", "set")
"""Keys of the table of one method."""

_VARIED = ("method", "sparsity", "arch", "seed", "from", "structure", "final_sparsity")
"""Settings that distinguish cells or come from the recipe's tables, and which `set` therefore cannot replace."""

_MAX_SEEDS = 1000
"""Largest number of seeds, against a seed that was meant to be a single one."""

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
    errors = [*_wrong_keys(tables)]
    family = _family(tables.get("recipe"), errors)
    cells: dict[str, Cell] = {}
    if family is not None:
        description = _Description(family, tables, overrides or {}, errors)
        own = _table(tables.get("method"))
        unknown = [name for name in own if name not in family.methods]
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


def _wrong_keys(tables: Mapping[str, Any]) -> Iterator[str]:
    """Yields a sentence for every key that is not allowed and every value that should be a table."""
    yield from (str(unknown_name("key", key, KEYS)) for key in tables if key not in KEYS)
    for key in ("recipe", "data"):
        if not isinstance(tables.get(key), str):
            yield f"{key} is {tables[key]!r}, expected a string." if key in tables else f"{key} is missing."
    if "set" in tables and not isinstance(tables["set"], Mapping):
        yield f"set is {tables['set']!r}, expected a table of settings."
    of_method = tables.get("method", {})
    if not isinstance(of_method, Mapping) or not all(isinstance(own, Mapping) for own in of_method.values()):
        yield f"method is {of_method!r}, expected one table for each method."
        return
    for method, own in of_method.items():
        yield from (
            str(unknown_name("key", f"method.{method}.{key}", [f"method.{method}.{known}" for known in _METHOD_KEYS]))
            for key in own
            if key not in _METHOD_KEYS
        )
        if "set" in own and not isinstance(own["set"], Mapping):
            yield f"method.{method}.set is {own['set']!r}, expected a table of settings."


def numbers(text: str) -> list[float]:
    """Parses numbers separated by commas, such as `.95,.98`; raises `UsageError` for anything else."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"{text!r} is not a list of numbers; write it like 0.9,0.95.") from error


def seeds(value: object) -> list[int]:
    """Returns seeds from their number, a list, or text such as `0-4` or `0,2,5-7`; raises `UsageError` otherwise."""
    listed: object = value
    if isinstance(value, int) and not isinstance(value, bool):  # True and False are integers to Python
        listed = list(range(value)) if 0 < value <= _MAX_SEEDS else None
    elif isinstance(value, str):
        listed = _ranges(value)
    # 63 bits, which torch's and numpy's generators both take.
    if (
        not isinstance(listed, list)
        or not listed
        or not all(isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 1 << 63 for seed in listed)
    ):
        raise UsageError(
            f"seeds {value!r} is not allowed; give a number of seeds, a list of them, or a range such as '0-4'."
        )
    return listed


def _ranges(text: str) -> list[int] | None:
    """Parses seeds and ranges separated by commas; None if the text is something else."""
    parsed: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        try:
            low, high = int(first), int(last or first)
        except ValueError:
            return None
        if not low <= high < low + _MAX_SEEDS:
            return None
        parsed += range(low, high + 1)
    return parsed


def _family(name: object, errors: list[str]) -> Family | None:
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


def _table(value: object) -> Mapping[str, Any]:
    # `_wrong_keys` reports values that are not tables. Here they count as empty, so that other errors are found too.
    return value if isinstance(value, Mapping) else {}


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
        return (self.tables, _table(_table(self.tables.get("method")).get(method)), self.overrides)

    def settings(self, method: str) -> list[str]:
        """Returns the settings of a method as `key=value`; adds those that the grid varies to the errors."""
        pairs = [pair for layer in self._layers(method) for pair in _table(layer.get("set")).items()]
        varied = dict.fromkeys(key for key, _ in pairs if key.rpartition(".")[2] in _VARIED)
        self.errors.extend(f"set {key} of method {method} is varied by the grid; remove it." for key in varied)
        # As a list in the order of the layers, not as a dict: `epochs` and `train.epochs` are one key.
        return [f"{key}={toml_value(value)}" for key, value in pairs if key not in varied]

    def cells(self, method: str) -> Iterator[Cell]:
        """Yields the cells of one method; adds everything that is wrong with them to the errors."""
        settings = self.settings(method)
        wanted = {key: value for layer in self._layers(method) for key, value in layer.items()}
        chosen = self._checked("seed", method, lambda: seeds(wanted.get("seeds", 1)))
        sparsities: Sequence[float | None] = [None]
        if self.family.has_sparsities(method):
            sparsities = self._checked("sparsity", method, lambda: _sparsities(wanted.get("sparsity"), self.family))
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


def _sparsities(value: object, family: Family) -> list[float]:
    if value is None:
        return list(family.sparsities)
    values: list[Any] = value if isinstance(value, list) else [value]
    for one in values:
        if isinstance(one, bool) or not isinstance(one, (int, float)) or not 0 <= one < 1:
            raise UsageError(f"sparsity {one!r} is not in [0, 1); give fractions of zeros, e.g. 0.9.")
    return [float(one) for one in values]


def _name(method: str, sparsity: float | None, seed: int) -> str:
    return f"{method}-s{seed}" if sparsity is None else f"{method}@{sparsity:g}-s{seed}"


def _add_start(cell: Cell, cells: dict[str, Cell], description: _Description) -> None:
    """Sets the cell that another one starts from, with the same seed, and adds it if the grid does not have it."""
    start = cell.recipe.after
    if start is None:
        return
    if start not in description.family.methods:
        description.errors.append(f"method {cell.method} starts from {start!r}, which the recipe does not have.")
        return
    sparsity = cell.sparsity if description.family.has_sparsities(start) else None
    name = _name(start, sparsity, cell.seed)
    cells[cell.name] = replace(cell, needs=name)
    if name in cells:
        return
    try:
        recipe = override(description.family.row(start, sparsity), description.settings(start))
        cells[name] = Cell(name, start, sparsity, cell.seed, recipe)
    except DsrError as error:
        description.errors.append(str(error))
        return
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
