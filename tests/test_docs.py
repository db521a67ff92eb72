"""Files and symbols that the pages name exist."""

import ast
import re
from pathlib import Path

import pytest

from dsr_tool.methods import METHODS
from exporters.containers import CONTAINERS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
STARTS = [ROOT, ROOT / "dsr_tool", ROOT / "dsr_tool" / "runtime"]
"""Folders that pages leave out of the paths that they name."""

_FILE = r"`((?:[a-z_]+/)+[a-z_0-9]+\.(?:py|cpp|h|def|toml|sh))`"
_ROOM = r"`((?:dsr_tool|converters|exporters|tests|docs|benchmarks)/(?:[a-z_0-9]+/?)*)`"


def _found(name: str) -> Path | None:
    return next((start / name for start in STARTS if (start / name).exists()), None)


def _defined(path: Path) -> set[str]:
    """Names of the classes, functions and methods (`Class.method`) of a Python file, and of those of a C++ file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return set(re.findall(r"\b([a-z_]+)\(", text))
    names = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        for inner in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(inner, ast.FunctionDef):
                names.add(f"{node.name}.{inner.name}")
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    named = {*re.findall(_FILE, text), *re.findall(_ROOM, text)}
    assert [name for name in sorted(named) if _found(name) is None] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_symbols_that_a_page_names_beside_a_file_are_defined_there(page):
    text = page.read_text(encoding="utf-8")
    pairs = re.findall(_FILE + r",\s+`([A-Za-z_]+(?:\.[a-z_]+)?)`", text)
    pairs += [(path, symbol) for symbol, path in re.findall(r"^\| `(\w+)` \| " + _FILE, text, re.M)]
    missing = [f"{path}: {symbol}" for path, symbol in pairs if (file := _found(path)) and symbol not in _defined(file)]
    assert missing == []


def test_the_readme_lists_every_method_and_every_container():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for option, table in (("method", METHODS), ("to", CONTAINERS)):
        (listed,) = re.findall(rf"`--{option} ((?:[a-z-]+ \| )+[a-z-]+)`", text)
        assert sorted(listed.split(" | ")) == sorted(table), f"README lists other values of --{option}"


def test_the_walk_names_a_symbol_at_every_room():
    """The page would say little if its symbols were not found by the pattern above."""
    walk = (ROOT / "docs" / "life-of-a-weight.md").read_text(encoding="utf-8")
    assert len(re.findall(_FILE + r",\s+`", walk)) >= 12
