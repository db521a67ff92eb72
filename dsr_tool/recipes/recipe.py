"""The two nouns: a recipe is one row of a published table, a family is all rows of one architecture and data set.

A family has a table of settings per method. A row such as `wrn-28-2/set@0.9` resolves to a recipe: flat tables from
which `convert` and `train` read their arguments. In the tables of a family, the text `@sparsity` stands for the
sparsity of the row.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dsr_tool.errors import UsageError, unknown_name

__all__ = ["FAMILY_SCHEMA", "RECIPE_SCHEMA", "TABLES", "Family", "Recipe", "toml_value"]

FAMILY_SCHEMA, RECIPE_SCHEMA = "dsr-tool/recipes/1", "dsr-tool/recipe/1"
"""Value of `schema` in the file of a family, and in the file of one row."""
TABLES = ("model", "train", "options")
"""Tables of settings that a recipe has."""

_SPARSITY = "@sparsity"


@dataclass(frozen=True)
class Recipe:
    """One row of a published table.

    Attributes:
        name: `family/method@sparsity`.
        about: the method in a few words.
        data: name of the data set, as for `--data`; the user adds its path.
        source: publication of the schedule and the figures.
        model: arguments of `convert` by option name; `from` and `structure` name the method of the same family whose
            run this row starts from.
        train: fields of `TrainSettings`.
        options: options of the method.
        paper: reported `accuracy` as a fraction, with standard deviation `sd` and number of seeds `n`; empty if none
            was reported.
        origin: file and row that the recipe was read from, for messages.
    """

    name: str
    about: str = ""
    data: str = ""
    source: str = ""
    model: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    paper: Mapping[str, Any] = field(default_factory=dict)
    origin: str = ""

    @property
    def after(self) -> str | None:
        """The method of the same family whose run this one starts from, or None."""
        return self.model.get("from") or self.model.get("structure")

    def to_toml(self) -> str:
        """Returns the recipe as a file of its own, which `find_recipe` reads back unchanged."""
        head = {key: getattr(self, key) for key in ("name", "about", "data", "source") if getattr(self, key)}
        lines = _assignments({"schema": RECIPE_SCHEMA, **head})
        for table in (*TABLES, "paper"):
            if values := getattr(self, table):
                lines += ["", f"[{table}]", *_assignments(values)]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Family:
    """One architecture on one data set, and how each method trains it.

    Attributes:
        name: file name without `.toml`.
        title: heading for a reader.
        data: name of the data set, as for `--data`.
        source: publication of the schedules and the figures.
        sparsities: sparsities of the published table.
        base: tables `model`, `train` and `options` that all rows share.
        methods: by method, the entries that replace or extend those of `base`.
        origin: file that the family was read from, for messages.
    """

    name: str
    title: str
    data: str
    source: str
    sparsities: tuple[float, ...]
    base: Mapping[str, Mapping[str, Any]]
    methods: Mapping[str, Mapping[str, Any]]
    origin: str

    def rows(self) -> Iterator[Recipe]:
        """Yields all rows of the published table."""
        for name, method in self.methods.items():
            if not self.has_sparsities(name):
                yield self.row(name)
                continue
            for sparsity in method.get("sparsities", self.sparsities):
                yield self.row(name, sparsity)

    def has_sparsities(self, method: str) -> bool:
        """Returns whether a method has a row for each sparsity, rather than a single row as a dense model has.

        Raises:
            UsageError: the family has no such method.
        """
        if method not in self.methods:
            raise unknown_name(f"method of recipe {self.name!r}", method, self.methods)
        return any(value == _SPARSITY for table in self._merge(method).values() for value in table.values())

    def row(self, method: str, sparsity: float | None = None) -> Recipe:
        """Returns one row, also at a sparsity that the published table does not have.

        Raises:
            UsageError: the family has no such method, or the method has no values for this sparsity.
        """
        label = f"{self.name}/{method}"
        if self.has_sparsities(method) != (sparsity is not None):
            if sparsity is None:
                raise UsageError(f"recipe {label!r} needs a sparsity; write {label}@{self.sparsities[0]:g}.")
            raise UsageError(f"recipe {label!r} has no sparsity; write {label}.")
        own = self.methods[method]
        # Keys of TOML are text, and "0.9" and "0.90" are the same sparsity.
        at = {float(key): value for key, value in own.get("at", {}).items()}
        if at and sparsity not in at:
            raise UsageError(
                f"recipe {label!r} has no values for sparsity {sparsity:g}; give one of "
                f"{', '.join(f'{known:g}' for known in sorted(at))}, or copy a row to a file and change it."
            )
        tables = {
            table: {key: sparsity if value == _SPARSITY else value for key, value in values.items()}
            for table, values in self._merge(method, at.get(sparsity or 0.0, {})).items()
        }
        # A row may train with another method than it is named after: "thin-dense" is trained as "dense".
        tables["train"] = {"method": method, **tables["train"]}
        name = label if sparsity is None else f"{label}@{sparsity:g}"
        paper = _reported(own.get("accuracy", {}), "dense" if sparsity is None else f"{sparsity:g}")
        about = str(own.get("about", ""))
        return Recipe(name, about, self.data, self.source, **tables, paper=paper, origin=f"{self.origin}: {name}")

    def _merge(self, method: str, at: Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
        """Merges the tables of base, method and sparsity; later ones win."""
        layers = (self.base, self.methods[method], at or {})
        return {
            table: {key: value for layer in layers for key, value in layer.get(table, {}).items()} for table in TABLES
        }


def _reported(accuracy: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Returns a published `[mean]` or `[mean, sd, n]` in per cent as fractions by name."""
    by_number = {f"{float(k):g}" if k != "dense" else k: values for k, values in accuracy.items()}
    if key not in by_number:
        return {}
    mean, *rest = by_number[key]
    # Rounded, since per cent divided by 100 leaves digits that nobody published.
    spread = {"sd": round(rest[0] / 100, 6), "n": rest[1]} if rest else {}
    return {"accuracy": round(mean / 100, 6), **spread}


def _assignments(values: Mapping[str, Any]) -> list[str]:
    return [f"{key} = {toml_value(value)}" for key, value in values.items()]


def toml_value(value: object) -> str:
    """Returns a plain value as TOML. JSON's texts, numbers, booleans and lists are valid TOML."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(_assignments(value)) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    # TOML has dates and JSON has not; no setting is a date, so as a text it is refused later like any wrong value.
    return json.dumps(value, ensure_ascii=False, default=str)
