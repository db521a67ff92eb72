"""Links of the site: pages name each other as files of the repository, and here these names become links."""

from __future__ import annotations

import posixpath
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
_IN_DOCS = r"docs/[A-Za-z0-9_./-]*"
FROM_ROOT = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Files of the root that are pages of the site, with the paths that they have there."""
_FENCE = re.compile(r"^\s*(```+|~~~+)")
_INDENTED = re.compile(r"^(?: {4}|\t)")


def linked(markdown: str, uri: str) -> str:
    """Returns a page in which each name of another page, such as `docs/runtime.md`, is a link with that page's title.

    Args:
        markdown: the page.
        uri: its path below `docs`.
    """

    def link(found: re.Match[str]) -> str:
        target = _target(found[1])
        if target is None or target == uri:
            return found[0]
        return f"[{_title(target, found[1])}]({posixpath.relpath(target, posixpath.dirname(uri) or '.')})"

    names = rf"(?<!\[)`({_IN_DOCS}|{'|'.join(map(re.escape, FROM_ROOT))})`"
    return "\n".join(re.sub(names, link, line) if prose else line for line, prose in _lines(markdown))


def relocated(markdown: str) -> str:
    """Returns a page of the root as it must be below `docs`: links to files that the site lacks become their text."""

    def link(found: re.Match[str]) -> str:
        text, target = found[1], found[2]
        if re.match(r"[a-z]+:|#", target):
            return found[0]
        if target.startswith("docs/"):
            return f"{text}({target.removeprefix('docs/')})"
        name, _, anchor = target.partition("#")
        if name in FROM_ROOT:
            return f"{text}({FROM_ROOT[name]}{'#' + anchor if anchor else ''})"
        return text.lstrip("!")[1:-1]

    markdown = re.sub(r"""((?:src|srcset|href)=["'])docs/""", r"\1", markdown)
    return re.sub(r"(!?\[[^\]]*\])\(([^)\s]+)\)", link, markdown)


def _lines(markdown: str) -> list[tuple[str, bool]]:
    """Returns the lines, and whether each is prose, not code."""
    lines, fence = [], ""
    for line in markdown.split("\n"):
        found = _FENCE.match(line)
        if found and not fence:
            fence = found[1]
        elif found and found[1].startswith(fence):
            fence = ""
            lines.append((line, False))
            continue
        lines.append((line, not fence and not _INDENTED.match(line)))
    return lines


def _target(name: str) -> str | None:
    """Returns the path below `docs` that a name stands for; None if the site has no such page."""
    if name in FROM_ROOT:
        return FROM_ROOT[name]
    path = ROOT / name
    if path.is_dir():
        path = path / "README.md"
    return path.relative_to(ROOT / "docs").as_posix() if path.is_file() else None


@cache
def _title(target: str, name: str) -> str:
    """Returns the first heading of a page, a decision's number, or the name of another file."""
    if number := re.match(r"decisions/0*(\d+)", target):
        return f"decision {number[1]}"
    path = ROOT / "docs" / target
    if path.suffix != ".md" or not path.exists():
        return f"`{posixpath.basename(name)}`"
    return re.findall(r"^# (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)[0]
