"""Checks the values of a grid's description: keys, tables, numbers, seeds and sparsities."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dsr_tool.errors import UsageError, unknown_name
from dsr_tool.recipes.recipe import Family

__all__ = ["parse_numbers", "parse_seeds", "parse_sparsities", "table_or_empty", "wrong_keys"]

_KEYS = ("recipe", "data", "methods", "sparsity", "seeds", "set", "method")
"""Keys at the top of a grid file."""

_METHOD_KEYS = ("sparsity", "seeds", "set")
"""Keys of the table of one method."""

_MAX_SEEDS = 1000
"""Largest number of seeds, and longest range: `seeds = 1234` most likely means a single seed."""


def wrong_keys(tables: Mapping[str, Any]) -> Iterator[str]:
    """Yields a sentence for every key that is not allowed and every value that should be a table."""
    yield from (str(unknown_name("key", key, _KEYS)) for key in tables if key not in _KEYS)
    for key in ("recipe", "data"):
        if not isinstance(tables.get(key), str):
            yield f"{key} is {tables[key]!r}, expected a string." if key in tables else f"{key} is missing."
    if "set" in tables and not isinstance(tables["set"], Mapping):
        yield f"set is {tables['set']!r}, expected a table of settings."
    # Tables of unknown methods are reported by the grid, which knows the family.
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


def parse_numbers(text: str) -> list[float]:
    """Parses numbers separated by commas, such as `.95,.98`; raises `UsageError` for anything else."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"{text!r} is not a list of numbers; write it like 0.9,0.95.") from error


def parse_seeds(value: object) -> list[int]:
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


def parse_sparsities(value: object, family: Family) -> list[float]:
    """Returns sparsities from a number or a list; those of the family for None; raises `UsageError` otherwise."""
    if value is None:
        return list(family.sparsities)
    # TOML allows a single number, and its 0 and 1 may be written as integers.
    values: list[Any] = value if isinstance(value, list) else [value]
    for one in values:
        if isinstance(one, bool) or not isinstance(one, (int, float)) or not 0 <= one < 1:
            raise UsageError(f"sparsity {one!r} is not in [0, 1); give fractions of zeros, e.g. 0.9.")
    return [float(one) for one in values]


def table_or_empty(value: object) -> Mapping[str, Any]:
    """Returns a table; an empty one for any other value, which `wrong_keys` reports, so that other errors are found."""
    return value if isinstance(value, Mapping) else {}
