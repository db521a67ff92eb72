"""The recipes as documents and as text, for `dsr-tool recipes`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dsr_tool.recipes.recipe import FAMILY_SCHEMA, RECIPE_SCHEMA, TABLES, Family, Recipe

__all__ = ["families_document", "family_text", "method_text", "recipe_document"]


def families_document(families: Sequence[Family]) -> dict[str, Any]:
    """Returns the rows of some families as plain values, schema `dsr-tool/recipes/1`."""
    return {"schema": FAMILY_SCHEMA, "recipes": [_head(row) for family in families for row in family.rows()]}


def recipe_document(recipe: Recipe) -> dict[str, Any]:
    """Returns one row with its settings as plain values, schema `dsr-tool/recipe/1`."""
    return {"schema": RECIPE_SCHEMA, **_head(recipe), **{table: dict(getattr(recipe, table)) for table in TABLES}}


def family_text(family: Family) -> str:
    """Returns a line for each row of a family, with the published accuracy."""
    return _table(family, [(row.name, _accuracy(row.paper), row.about) for row in family.rows()])


def method_text(family: Family) -> str:
    """Returns a line for each method of a family, with the sparsities of its rows."""
    rows_by_method: dict[str, list[Recipe]] = {}
    for row in family.rows():
        rows_by_method.setdefault(row.name.partition("@")[0], []).append(row)
    lines = []
    for name, rows in rows_by_method.items():
        sparsities = [row.name.partition("@")[2] for row in rows]
        if family.has_sparsities(name.partition("/")[2]):
            lines.append((f"{name}@S", f"S = {' '.join(sparsities)}", rows[0].about))
        else:
            lines.append((name, "", rows[0].about))
    return _table(family, lines)


def _head(recipe: Recipe) -> dict[str, Any]:
    return {key: getattr(recipe, key) for key in ("name", "about", "data", "source")} | {"paper": dict(recipe.paper)}


def _table(family: Family, lines: Sequence[tuple[str, str, str]]) -> str:
    """Aligns the first two columns below the family's heading."""
    widths = [max(len(line[i]) for line in lines) for i in (0, 1)]
    table = (f"  {name:<{widths[0]}}  {middle:<{widths[1]}}  {about}" for name, middle, about in lines)
    return "\n".join([f"{family.title} ({family.source})", *table])


def _accuracy(paper: Mapping[str, Any]) -> str:
    """Returns the published accuracy in per cent, or an empty text."""
    if not paper:
        return ""
    spread = f" ± {100 * paper['sd']:.2f} (n={paper['n']})" if "sd" in paper else ""
    return f"{100 * paper['accuracy']:.2f} %{spread}"
