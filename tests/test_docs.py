"""Files, symbols, commands and code that the pages name exist and run."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import click
import pytest

import dsr_tool
from dsr_tool.cli import COMMANDS
from dsr_tool.cli.group import cli
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


def test_the_page_of_commands_lists_every_method_and_every_container():
    text = (ROOT / "docs" / "using.md").read_text(encoding="utf-8")
    for option, table in (("method", METHODS), ("to", CONTAINERS)):
        (listed,) = re.findall(rf"`--{option} ((?:[a-z-]+ \| )+[a-z-]+)`", text)
        assert sorted(listed.split(" | ")) == sorted(table), f"the page lists other values of --{option}"


def test_the_walk_names_a_symbol_at_every_room():
    """The page would say little if its symbols were not found by the pattern above."""
    walk = (ROOT / "docs" / "life-of-a-weight.md").read_text(encoding="utf-8")
    assert len(re.findall(_FILE + r",\s+`", walk)) >= 12


_COMMAND = re.compile(r"^(?:.*--no-python )?(dsr-tool [a-z]+\b(?! [A-Z]+ ?\.\.\.).*)$")
"""A line of a block that calls the tool, also under torchrun."""


def _code(text: str) -> list[str]:
    """The lines of the code blocks of a page, fenced or indented; output (`text`) is none."""
    fenced = re.findall(r"^```(?:bash)?\n(.*?)^```$", text, re.M | re.S)
    indented = re.findall(r"(?<=\n\n)((?: {4}.*\n)+)", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))
    lines = "".join([*fenced, *indented]).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines]


def _commands(page: Path) -> list[str]:
    return [found[1] for line in _code(page.read_text(encoding="utf-8")) if (found := _COMMAND.match(line))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_on_a_page_exist_with_their_options(page):
    for line in _commands(page):
        _, name, *arguments = shlex.split(re.split(r"\s(?:[>|;]|\.\.\.)", line.replace("SEED", "0"))[0], comments=True)
        command = cli.get_command(click.Context(cli), name)
        try:
            command.make_context(name, arguments)
        except click.exceptions.Exit as ended:  # --help
            assert ended.exit_code == 0
        except click.ClickException as error:
            pytest.fail(f"{line}: {error.format_message()}")


def test_the_pages_show_every_command():
    shown = {line.split()[1] for page in PAGES for line in _commands(page)}
    assert shown == set(COMMANDS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_of_the_package_on_a_page_exist(page):
    text = page.read_text(encoding="utf-8")
    for name in set(re.findall(r"\bdsr_tool\.([A-Za-z_]+)\(", text)):
        assert name in dsr_tool.__all__, f"dsr_tool.{name}"
    imports = r"^\s*from ((?:dsr_tool|converters|exporters)[\w.]*) import ([\w, ]+?) *(?:#|$)"
    for module, names in re.findall(imports, text, re.M):
        for name in names.split(", "):
            assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


@pytest.mark.slow
def test_the_code_of_compact_training_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "training.md").read_text(encoding="utf-8"), re.S):
        exec(compile(code, "training.md", "exec"), names)  # noqa: S102
    assert names["model"].store is None


def test_the_loop_with_an_average_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8").partition("## In a loop of your own")[2]
    exec(compile(re.findall(r"```python\n(.*?)```", text, re.S)[0], "methods.md", "exec"), {})  # noqa: S102
    assert (tmp_path / "ema.dsr").exists()


def test_the_glossary_is_sorted_and_each_term_is_one_paragraph():
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    terms = re.findall(r"^\*\*(.+?)\.\*\* \S", text, re.M)
    assert len(terms) == len(re.findall(r"^\*\*", text, re.M)) > 30
    assert terms == sorted(terms, key=str.casefold)


def test_the_support_matrix_agrees_with_the_zoo(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from support import FAMILIES, family
    from zoo_table import passed_in_table, table_rows

    zoo = table_rows((ROOT / "docs" / "zoo.md").read_text(encoding="utf-8"))
    text = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")
    for title in FAMILIES:
        models = [row for row in zoo if family(row["model"]) == title]
        good = sum(map(passed_in_table, models))
        assert models and re.search(rf"^\| {title} \| {len(models)} \| .*\| {good} of {len(models)} \|", text, re.M)
