"""mkdocs calls these functions as it builds the site: pages made from elsewhere are added, and names become links."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from command_line import commands
from links import FROM_ROOT, ROOT, linked, relocated
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from notebooks import notebook

_NOTEBOOK = """\
!!! note ""
    Copy the blocks in order, or [download this page as a notebook]({name}).
"""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Lists the decisions, and pages that the navigation does not name: those are guides."""
    named = json.dumps(config.nav)
    for title, folder in (("Decisions", "decisions/"), ("Guides", "")):
        found = sorted(folder + path.name for path in (ROOT / "docs" / folder).glob("*.md"))
        listed = _entry(config.nav, title)
        if listed is not None:
            listed.extend(page for page in found if f'"{page}"' not in named)
    return config


def _entry(nav: Any, title: str) -> list[str] | None:
    """Returns the list of pages under a title of the navigation; None if there is no such title."""
    for item in nav if isinstance(nav, list) else ():
        for name, below in item.items() if isinstance(item, dict) else ():
            if name == title:
                return below
            if isinstance(below, list) and (found := _entry(below, title)) is not None:
                return found
    return None


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files of the root as pages, and a notebook for each tutorial."""
    for source, target in FROM_ROOT.items():
        text = relocated((ROOT / source).read_text(encoding="utf-8"))
        files.append(File.generated(config, target, content=text))
    for path in tutorials():
        files.append(File.generated(config, f"tutorials/{path.stem}.ipynb", content=notebook(path.read_text("utf-8"))))
    return files


def tutorials() -> list[Path]:
    """Returns the tutorials; their index has nothing to run."""
    return [path for path in sorted((ROOT / "docs" / "tutorials").glob("*.md")) if path.stem != "index"]


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Turns names of pages into links, fills in the commands, and offers a tutorial's notebook."""
    uri = page.file.src_uri
    markdown = linked(markdown, uri)
    if uri == "command-line.md":
        markdown += commands()
    if uri in {f"tutorials/{path.name}" for path in tutorials()}:
        title, _, rest = markdown.partition("\n")
        markdown = f"{title}\n\n{_NOTEBOOK.format(name=Path(uri).stem + '.ipynb')}{rest}"
    return markdown
