"""dsr-tool recipes: list, print and copy rows of published tables."""

from __future__ import annotations

from pathlib import Path

import click

from dsr_tool.cli.common import FilePath, emit, examples, result_options

__all__ = ["command"]


@click.command(
    "recipes",
    epilog=examples("dsr-tool recipes", "dsr-tool recipes wrn-28-2/set@0.9 -o mine.toml"),
)
@click.argument("name", required=False)
@click.option("-o", "--output", type=FilePath(), help="Copy the recipe to this file, to change it.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@result_options
def command(name: str | None, output: Path | None, force: bool, as_json: bool) -> None:
    """List all recipes or those of the family NAME, or print the recipe NAME as TOML.

    Two commands run a row: `dsr-tool convert --recipe NAME -o MODEL` and `dsr-tool train MODEL --recipe NAME --data
    SPEC -o RUN`. A row exists at other sparsities too if its method has the same settings for all of them.
    """
    from dsr_tool.errors import UsageError
    from dsr_tool.files import new_file
    from dsr_tool.recipes.files import families, find_recipe
    from dsr_tool.recipes.listing import families_document, family_text, method_text, recipe_document

    known = families()
    if name is None or name in known:
        if output is not None:
            raise UsageError(
                f"--output {str(output)!r} needs one recipe to copy; name one that `dsr-tool recipes` lists."
            )
        chosen = list(known.values()) if name is None else [known[name]]
        text = "\n\n".join((method_text if name is None else family_text)(family) for family in chosen)
        emit(families_document(chosen), text, as_json=as_json)
        return
    recipe = find_recipe(name)
    text = recipe.to_toml().rstrip("\n")
    if output is not None:
        with new_file(output, force=force) as part:
            part.write_text(recipe.to_toml(), encoding="utf-8")
        text = f"{output}: recipe {recipe.name}"
    emit(recipe_document(recipe), text, as_json=as_json)
