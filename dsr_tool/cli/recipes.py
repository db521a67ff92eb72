"""dsr-tool recipes: the rows of published tables, as settings that can be run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsr_tool.cli.common import emit, examples, result_options

if TYPE_CHECKING:
    from dsr_tool.recipes.recipe import Family, Recipe

__all__ = ["command"]


@click.command(
    "recipes",
    epilog=examples("dsr-tool recipes", "dsr-tool recipes wrn-28-2/set@0.9 -o mine.toml"),
)
@click.argument("name", required=False)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Copy the recipe to this file, to be changed.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@result_options
def command(name: str | None, output: Path | None, force: bool, as_json: bool) -> None:
    """List the recipes, those of one family, or print the recipe NAME as TOML.

    A row is run by two commands, `dsr-tool convert --recipe NAME -o MODEL` and `dsr-tool train MODEL --recipe NAME
    --data SPEC -o RUN`. Rows exist at other sparsities too, wherever the method has one setting for all.
    """
    from dsr_tool.errors import UsageError
    from dsr_tool.files import new_file
    from dsr_tool.recipes.files import families, find_recipe

    known = families()
    if name is None or name in known:
        if output is not None:
            raise UsageError("--output copies one recipe; name it, as `dsr-tool recipes` lists them.")
        chosen = list(known.values()) if name is None else [known[name]]
        text = "\n\n".join(_family(family, every=name is not None) for family in chosen)
        emit(
            {"schema": "dsr-tool/recipes/1", "recipes": [_row(r) for f in chosen for r in f.rows()]},
            text,
            as_json=as_json,
        )
        return
    recipe = find_recipe(name)
    text = recipe.to_toml()
    if output is not None:
        with new_file(output, force=force) as part:
            part.write_text(text, encoding="utf-8")
        text = f"{output}: recipe {recipe.name}\n"
    emit({"schema": "dsr-tool/recipe/1", **_row(recipe), **_tables(recipe)}, text.rstrip("\n"), as_json=as_json)


def _row(recipe: Recipe) -> dict[str, Any]:
    return {key: getattr(recipe, key) for key in ("name", "about", "data", "source")} | {"paper": dict(recipe.paper)}


def _tables(recipe: Recipe) -> dict[str, Any]:
    from dsr_tool.recipes.recipe import TABLES

    return {table: dict(getattr(recipe, table)) for table in TABLES}


def _family(family: Family, *, every: bool) -> str:
    """The rows of a family, one by one or one line for each method."""
    rows = list(family.rows())
    if every:
        lines = [(row.name, _reported(row.paper), row.about) for row in rows]
    else:
        names = dict.fromkeys(row.name.partition("@")[0] for row in rows)
        lines = [
            _of_method(family, name, [row for row in rows if row.name.partition("@")[0] == name]) for name in names
        ]
    widths = [max(len(line[i]) for line in lines) for i in (0, 1)]
    table = (f"  {name:<{widths[0]}}  {middle:<{widths[1]}}  {about}" for name, middle, about in lines)
    return "\n".join([f"{family.title} ({family.source})", *table])


def _of_method(family: Family, name: str, rows: list[Recipe]) -> tuple[str, str, str]:
    if not family.takes_sparsity(name.partition("/")[2]):
        return name, "", rows[0].about
    sparsities = [row.name.partition("@")[2] for row in rows]
    return f"{name}@S", f"S = {' '.join(sparsities)}", rows[0].about


def _reported(paper: Any) -> str:
    """The published accuracy in per cent."""
    if not paper:
        return ""
    spread = f" ± {100 * paper['sd']:.2f} (n={paper['n']})" if "sd" in paper else ""
    return f"{100 * paper['accuracy']:.2f} %{spread}"
