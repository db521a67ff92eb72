"""Recipes: everything that makes one row of a published table, by name or from a TOML file.

A file describes a family, one architecture on one data set, with a table per method. A row of it, such as
`wrn-28-2/set@0.9`, is resolved into a recipe: flat tables that `convert` and `train` take their values from. In a
family's tables the text `@sparsity` stands for the sparsity of the row.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dsr_tool.errors import UsageError, unknown_name

__all__ = ["FAMILY", "RECIPE", "TABLES", "Family", "Recipe", "toml_value"]

FAMILY, RECIPE = "dsr-tool/recipes/1", "dsr-tool/recipe/1"
"""What the files of a family, and of one row, say of themselves as `schema`."""
TABLES = ("model", "train", "options")
"""What a row is made of."""

_SPARSITY = "@sparsity"


@dataclass(frozen=True)
class Recipe:
    """One row.

    Attributes:
        name: `family/method@sparsity`.
        about: what the method does here, in a few words.
        data: name of the data set; where it lies is the user's to say.
        source: where schedule and figures were published.
        model: how the model is converted, by the names of `convert`; `from` and `structure` name the method of the
            same family whose run it starts from.
        train: how it is trained, by the names of `TrainSettings`.
        options: the method's own.
        paper: `accuracy` that was reported, a fraction, with `sd` and number of seeds `n`; empty where there is none.
        origin: where the recipe was read, for messages.
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
        """The method of the same family whose run this one starts from, if any."""
        return self.model.get("from") or self.model.get("structure")

    def to_toml(self) -> str:
        """The recipe as a file of its own, which `recipe_files.find_recipe` reads back."""
        head = {key: getattr(self, key) for key in ("name", "about", "data", "source") if getattr(self, key)}
        lines = _lines({"schema": RECIPE, **head})
        for table in (*TABLES, "paper"):
            if values := getattr(self, table):
                lines += ["", f"[{table}]", *_lines(values)]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Family:
    """One architecture on one data set, and how each method trains it.

    Attributes:
        name: of the file.
        title: for people.
        data: name of the data set.
        source: where schedules and figures were published.
        sparsities: of the published table.
        base: tables `model`, `train` and `options` that all rows share.
        methods: what each of them changes.
        origin: where it was read.
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
        """All rows of the published table."""
        for name, method in self.methods.items():
            if not self.takes_sparsity(name):
                yield self.row(name)
                continue
            for sparsity in method.get("sparsities", self.sparsities):
                yield self.row(name, sparsity)

    def takes_sparsity(self, method: str) -> bool:
        """Whether there is a row for each sparsity, rather than one for all, as of a dense model."""
        self._require(method)
        return any(value == _SPARSITY for table in self._merged(method).values() for value in table.values())

    def row(self, method: str, sparsity: float | None = None) -> Recipe:
        """One row, also at a sparsity that the published table does not have.

        Raises:
            UsageError: nobody knows the method, or it has no values for this sparsity.
        """
        label = f"{self.name}/{method}"
        if self.takes_sparsity(method) != (sparsity is not None):
            need = "needs a sparsity; write" if sparsity is None else "has no sparsity; write"
            raise UsageError(
                f"recipe {label!r} {need} {label}{f'@{self.sparsities[0]:g}' if sparsity is None else ''}."
            )
        own = self.methods[method]
        at = {float(key): value for key, value in own.get("at", {}).items()}
        if at and sparsity not in at:
            raise UsageError(
                f"recipe {label!r} has no values for sparsity {sparsity:g}; take one of "
                f"{', '.join(f'{known:g}' for known in sorted(at))}, or copy a row to a file and change it."
            )
        tables = self._merged(method, at.get(sparsity or 0.0, {}))
        filled = {
            table: {key: sparsity if value == _SPARSITY else value for key, value in values.items()}
            for table, values in tables.items()
        }
        filled["train"] = {"method": method, **filled["train"]}
        name = label if sparsity is None else f"{label}@{sparsity:g}"
        paper = _reported(own.get("accuracy", {}), "dense" if sparsity is None else f"{sparsity:g}")
        about = str(own.get("about", ""))
        return Recipe(name, about, self.data, self.source, **filled, paper=paper, origin=f"{self.origin}: {name}")

    def _merged(self, method: str, at: Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
        layers = (self.base, self.methods[method], at or {})
        return {
            table: {key: value for layer in layers for key, value in layer.get(table, {}).items()} for table in TABLES
        }

    def _require(self, method: str) -> None:
        if method not in self.methods:
            raise unknown_name(f"method of recipe {self.name!r}", method, self.methods)


def _reported(accuracy: Mapping[str, Any], key: str) -> dict[str, Any]:
    """What was published in per cent as `[mean]`, or `[mean, sd, n]`, as fractions."""
    by_number = {f"{float(k):g}" if k != "dense" else k: values for k, values in accuracy.items()}
    if key not in by_number:
        return {}
    mean, *rest = by_number[key]
    spread = {"sd": round(rest[0] / 100, 6), "n": rest[1]} if rest else {}
    return {"accuracy": round(mean / 100, 6), **spread}


def _lines(values: Mapping[str, Any]) -> list[str]:
    return [f"{key} = {toml_value(value)}" for key, value in values.items()]


def toml_value(value: Any) -> str:
    """A plain value as TOML; what JSON writes for texts, numbers, truth and lists of them is TOML too."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(_lines(value)) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    # Dates, which TOML has and JSON does not, are no setting's value; as texts they are refused like any other.
    return json.dumps(value, ensure_ascii=False, default=str)
