"""Recipes as TOML files: those that come with dsr-tool, and those of the user's own, read strictly."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from dsr_tool.errors import FormatError, UsageError, unknown_name
from dsr_tool.files import require_file
from dsr_tool.recipes.recipe import FAMILY, RECIPE, TABLES, Family, Recipe

if sys.version_info >= (3, 11):
    import tomllib
else:  # the same reader under its older name
    import tomli as tomllib

__all__ = ["families", "find_family", "find_recipe", "parse_toml", "read_toml"]

_TOP = ("schema", "title", "data", "source", "sparsities", *TABLES, "methods")
_METHOD = ("about", "sparsities", *TABLES, "at", "accuracy")
_ROW = ("schema", "name", "about", "data", "source", *TABLES, "paper")


def families() -> dict[str, Family]:
    """The families that come with dsr-tool."""
    folder = files("dsr_tool") / "recipes"
    found = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".toml")), key=lambda entry: entry.name)
    return {entry.name.removesuffix(".toml"): _family(entry.read_text(encoding="utf-8"), entry.name) for entry in found}


def find_family(name: str) -> Family:
    """A shipped family by name, or one from a file of the user's own (a name that ends in `.toml`).

    Raises:
        UsageError: nobody knows it, or its tables have keys or values that are not allowed; all of them are listed.
        FileError: no such file.
        FormatError: the file is no TOML.
    """
    if name.endswith(".toml"):
        return _family(_text(Path(name)), name)
    known = families()
    if name not in known:
        raise unknown_name("recipe", name, known)
    return known[name]


def find_recipe(name: str) -> Recipe:
    """A shipped row by name (`wrn-28-2/dsr@0.9`), or one from a file; raises as `find_family` does."""
    if name.endswith(".toml"):
        return _row(_text(Path(name)), name)
    family, slash, rest = name.partition("/")
    if not slash:
        known = families()
        if family in known:
            first = next(known[family].rows()).name
            raise UsageError(f"recipe {name!r} is a family of rows; name one of them, such as {first}.")
        raise unknown_name("recipe", name, [row.name for one in known.values() for row in one.rows()])
    method, at, sparsity = rest.partition("@")
    return find_family(family).row(method, _sparsity(sparsity, name) if at else None)


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """The tables of a file; raises `FileError` or `FormatError`."""
    return parse_toml(_text(path, what), str(path))


def parse_toml(text: str, origin: str) -> dict[str, Any]:
    """The tables of a text; raises `FormatError`."""
    try:
        tables: dict[str, Any] = tomllib.loads(text)
        return tables
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise FormatError(f"{origin!r} is not understood as TOML: {error}; correct that line.") from error


def _text(path: Path, what: str = "recipe") -> str:
    require_file(path, what)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{what} {str(path)!r} is not a text file in UTF-8; give a TOML file.") from error


def _sparsity(text: str, name: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise UsageError(f"recipe {name!r} has a sparsity {text!r} that is not allowed; give a fraction in [0, 1).")
    return value


def _family(text: str, origin: str) -> Family:
    tables = parse_toml(text, origin)
    errors = [*_wrong(tables, FAMILY, _TOP, ("schema", "title", "data", "source"), (*TABLES, "methods"))]
    methods = tables.get("methods", {})
    if not errors:
        errors = [error for name, own in methods.items() for error in _wrong_method(name, own)]
        errors += _wrong_sparsities("sparsities", tables.get("sparsities", []))
    _refuse(errors, origin)
    name = Path(origin).name.removesuffix(".toml")
    base = {table: tables.get(table, {}) for table in TABLES}
    texts = {key: str(tables.get(key, "")) for key in ("title", "data", "source")}
    return Family(
        name, **texts, sparsities=tuple(tables.get("sparsities", ())), base=base, methods=methods, origin=origin
    )


def _wrong_method(name: str, own: Any) -> Iterator[str]:
    where = f"methods.{name}"
    if not isinstance(own, Mapping):
        yield f"{where} is {own!r}, and should be a table."
        return
    yield from _wrong_keys(own, _METHOD, f"{where}.")
    yield from _wrong_types(own, ("about",), (*TABLES, "at", "accuracy"), f"{where}.")
    yield from _wrong_sparsities(f"{where}.sparsities", own.get("sparsities", []))
    at = own.get("at", {})
    if isinstance(at, Mapping):
        for key, value in at.items():
            yield from _wrong_sparsities(f"{where}.at", [key])
            if not isinstance(value, Mapping) or not set(value) <= set(TABLES):
                yield f"{where}.at.{key} is {value!r}, and should hold tables {', '.join(TABLES)}."


def _wrong_sparsities(key: str, values: Any) -> Iterator[str]:
    for value in values if isinstance(values, list) else [values]:
        try:
            good = not isinstance(value, bool) and 0 <= float(value) < 1
        except (TypeError, ValueError):
            good = False
        if not good:
            yield f"{key} {value!r} is not allowed; give fractions in [0, 1)."


def _row(text: str, origin: str) -> Recipe:
    tables = parse_toml(text, origin)
    if tables.get("schema") == FAMILY:
        raise UsageError(
            f"recipe {origin!r} describes a family of rows; `dsr-tool compare` takes those, here give one."
        )
    _refuse(_wrong(tables, RECIPE, _ROW, ("schema", "name", "about", "data", "source"), (*TABLES, "paper")), origin)
    values = {key: value for key, value in tables.items() if key != "schema"}
    return Recipe(**{"name": Path(origin).stem, **values}, origin=origin)


def _wrong(
    tables: Mapping[str, Any], schema: str, known: Sequence[str], texts: Sequence[str], inner: Sequence[str]
) -> Iterator[str]:
    """Everything at the top of a file that is not as it should be."""
    if tables.get("schema", schema) != schema:
        yield f"schema is {tables['schema']!r}, and should be {schema!r}."
    yield from _wrong_keys(tables, known, "")
    yield from _wrong_types(tables, texts, inner, "")


def _wrong_keys(table: Mapping[str, Any], known: Sequence[str], where: str) -> Iterator[str]:
    yield from (
        str(unknown_name("key", f"{where}{key}", [where + k for k in known])) for key in table if key not in known
    )


def _wrong_types(table: Mapping[str, Any], texts: Sequence[str], inner: Sequence[str], where: str) -> Iterator[str]:
    for key, value in table.items():
        if key in texts and not isinstance(value, str):
            yield f"{where}{key} is {value!r}, and should be a text."
        if key in inner and not isinstance(value, Mapping):
            yield f"{where}{key} is {value!r}, and should be a table."


def _refuse(errors: Iterable[str], origin: str) -> None:
    """Raise one error that lists all."""
    if listed := list(errors):
        raise UsageError(f"recipe {origin!r}: {' '.join(listed)}")
