"""Recipes as TOML files, read strictly: the shipped ones, and those of the user."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from dsr_tool.errors import FormatError, UsageError, unknown_name
from dsr_tool.files import require_file
from dsr_tool.recipes.recipe import FAMILY_SCHEMA, RECIPE_SCHEMA, TABLES, Family, Recipe

if sys.version_info >= (3, 11):
    import tomllib
else:  # the same parser under its older name
    import tomli as tomllib

__all__ = ["families", "find_family", "find_recipe", "parse_toml", "read_toml"]

_Kinds = Mapping[str, type]
"""Keys that a table may have, and for each `str`, `Mapping` (a table) or `list` (of sparsities)."""

_OF_RECIPE: _Kinds = {"schema": str} | {
    entry.name: str if entry.type == "str" else Mapping for entry in fields(Recipe) if entry.name != "origin"
}
_OF_FAMILY: _Kinds = {
    **dict.fromkeys(("schema", "title", "data", "source"), str),
    **dict.fromkeys((*TABLES, "methods"), Mapping),
    "sparsities": list,
}
_OF_METHOD: _Kinds = {
    "about": str,
    **dict.fromkeys((*TABLES, "at", "accuracy"), Mapping),
    "sparsities": list,
}
_KIND_NAMES: Mapping[type, str] = {str: "a text", Mapping: "a table"}


def families() -> dict[str, Family]:
    """Returns the shipped families by name."""
    folder = files("dsr_tool") / "recipes"
    entries = sorted(
        (entry for entry in folder.iterdir() if entry.name.endswith(".toml")), key=lambda entry: entry.name
    )
    return {
        entry.name.removesuffix(".toml"): _parse_family(entry.read_text(encoding="utf-8"), entry.name)
        for entry in entries
    }


def find_family(name: str) -> Family:
    """Returns a shipped family by name, or the family in a file if the name ends in `.toml`.

    Raises:
        UsageError: no such family, or its tables have keys or values that are not allowed; all of them are listed.
        FileError: no such file.
        FormatError: the file is not TOML.
    """
    if name.endswith(".toml"):
        return _parse_family(_read_text(Path(name)), name)
    known = families()
    if name not in known:
        raise unknown_name("recipe", name, known)
    return known[name]


def find_recipe(name: str) -> Recipe:
    """Returns a shipped row by name, such as `wrn-28-2/dsr@0.9`, or the row in a file. Raises as `find_family` does."""
    if name.endswith(".toml"):
        return _parse_recipe(_read_text(Path(name)), name)
    family, slash, rest = name.partition("/")
    if not slash:
        known = families()
        if family in known:
            first = next(known[family].rows()).name
            raise UsageError(f"recipe {name!r} is a family of rows; give one of its rows, such as {first}.")
        raise unknown_name("recipe", name, [row.name for one in known.values() for row in one.rows()])
    method, at, sparsity = rest.partition("@")
    return find_family(family).row(method, _parse_sparsity(sparsity, name) if at else None)


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """Returns the tables of a file; raises `FileError` or `FormatError`, which call the file `what`."""
    return parse_toml(_read_text(path, what), str(path))


def parse_toml(text: str, origin: str) -> dict[str, Any]:
    """Returns the tables of a text; raises `FormatError`, which names the `origin`."""
    try:
        tables: dict[str, Any] = tomllib.loads(text)
        return tables
    except (tomllib.TOMLDecodeError, RecursionError) as error:  # deeply nested lists recurse
        raise FormatError(f"{origin!r} is not valid TOML: {error}; correct that line.") from error


def _read_text(path: Path, what: str = "recipe") -> str:
    require_file(path, what)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{what} {str(path)!r} is not UTF-8 text; give a TOML file.") from error


def _parse_sparsity(text: str, name: str) -> float:
    if not _is_sparsity(text):
        raise UsageError(f"recipe {name!r}: sparsity {text!r} is not in [0, 1); give the fraction of zeros, e.g. 0.9.")
    return float(text)


def _parse_family(text: str, origin: str) -> Family:
    tables = parse_toml(text, origin)
    methods = tables.get("methods", {})
    errors = [*_schema_errors(tables, FAMILY_SCHEMA), *_table_errors(tables, _OF_FAMILY, "")]
    if isinstance(methods, Mapping):  # if not, that error is listed already
        errors += [error for name, own in methods.items() for error in _method_errors(name, own)]
    _raise_all(errors, origin)
    return Family(
        name=Path(origin).name.removesuffix(".toml"),
        **{key: tables.get(key, "") for key in ("title", "data", "source")},
        sparsities=tuple(tables.get("sparsities", ())),
        base={table: tables.get(table, {}) for table in TABLES},
        methods=methods,
        origin=origin,
    )


def _parse_recipe(text: str, origin: str) -> Recipe:
    tables = parse_toml(text, origin)
    if tables.get("schema") == FAMILY_SCHEMA:
        raise UsageError(
            f"recipe {origin!r} describes a family of rows; give one row here, or the family to `dsr-tool compare`."
        )
    _raise_all([*_schema_errors(tables, RECIPE_SCHEMA), *_table_errors(tables, _OF_RECIPE, "")], origin)
    values = {key: value for key, value in tables.items() if key != "schema"}
    return Recipe(**{"name": Path(origin).stem, **values}, origin=origin)


def _schema_errors(tables: Mapping[str, Any], schema: str) -> Iterator[str]:
    if tables.get("schema", schema) != schema:
        yield f"schema is {tables['schema']!r}, expected {schema!r}."


def _table_errors(table: Mapping[str, Any], kinds: _Kinds, prefix: str) -> Iterator[str]:
    """Yields a sentence for every unknown key and every value of the wrong kind."""
    for key, value in table.items():
        if key not in kinds:
            yield str(unknown_name("key", prefix + key, [prefix + known for known in kinds]))
        elif kinds[key] is list:
            yield from _sparsity_errors(prefix + key, value if isinstance(value, list) else [value])
        elif not isinstance(value, kinds[key]):
            yield f"{prefix}{key} is {value!r}, expected {_KIND_NAMES[kinds[key]]}."


def _method_errors(name: str, own: object) -> Iterator[str]:
    prefix = f"methods.{name}"
    if not isinstance(own, Mapping):
        yield f"{prefix} is {own!r}, expected a table."
        return
    yield from _table_errors(own, _OF_METHOD, f"{prefix}.")
    at = own.get("at", {})
    for key, value in at.items() if isinstance(at, Mapping) else ():
        yield from _sparsity_errors(f"{prefix}.at", [key])
        # Their keys are checked once a row is made of them, together with those of the other tables.
        if not isinstance(value, Mapping) or not set(value) <= set(TABLES):
            yield f"{prefix}.at.{key} is {value!r}, expected tables {', '.join(TABLES)}."


def _sparsity_errors(key: str, values: Iterable[object]) -> Iterator[str]:
    for value in values:
        if not _is_sparsity(value):
            yield f"{key} {value!r} is not in [0, 1); give fractions of zeros."


def _is_sparsity(value: object) -> bool:
    """Returns whether a number, or the text of one, is in [0, 1)."""
    # True is an int in Python, and NaN compares false with both bounds.
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return False
    try:
        return 0 <= float(value) < 1
    except ValueError:
        return False


def _raise_all(errors: list[str], origin: str) -> None:
    if errors:
        raise UsageError(f"recipe {origin!r}: {' '.join(errors)}")
