"""The tutorials run as they are written, in order, in an empty folder, and print what they say."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
NAMES = [path.stem for path in sorted((ROOT / "docs" / "tutorials").glob("*.md")) if path.stem != "index"]
SLOW = {"fine-tune"}
"""Tutorials that take more than some seconds: a budget in bytes and a training of MobileNetV2."""

CHOSEN = {"fine-tune": "circle|square|triangle"}
"""Words of the output that depend on the weights: classes, since the tests have no trained ones."""


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    title: str
    text: str


def blocks(name):
    text = (ROOT / "docs" / "tutorials" / f"{name}.md").read_text(encoding="utf-8")
    return [Block(*found) for found in re.findall(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', text, re.M | re.S)]


def results(name, folder):
    """Runs a tutorial in a folder; yields each expected output with the one that was printed."""
    printed, names = "", {}
    for block in blocks(name):
        if block.title:
            (folder / block.title).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            printed = captured(lambda code=block.text: exec(compile(code, name, "exec"), names))  # noqa: S102
        elif block.language == "bash":
            printed = bash(block.text, folder)
        else:
            assert block.language == "text", f"{name}: nothing says how to run a block of {block.language}"
            yield block.text, printed
            printed = ""


def bash(text, folder):
    """Runs lines that only call the tool in this process, which has imported torch already; others in bash."""
    lines = text.splitlines()
    if all(re.fullmatch(r"dsr-tool [^|;&<>$]*", line) for line in lines):
        return "".join(captured(lambda line=line: command(shlex.split(line))) for line in lines)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-ec", text], cwd=folder, env=environment, stdout=-1, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, (text, done.stdout)
    return done.stdout


def command(words):
    from dsr_tool import cli

    before, sys.argv = sys.argv, words
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        sys.argv = before
    assert ended.value.code == 0, words


def captured(call):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    try:
        with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
            call()
    finally:
        text = stream.buffer.getvalue().decode("utf-8")
        print(text)  # for the report of a failure
    return text


def normal(text, chosen):
    """Returns text without what depends on the machine: numbers, widths of columns, the level of the kernels."""
    text = re.sub(r"\b(?:avx512|avx2|baseline|neon)\b", "LEVEL", text)
    text = re.sub(r"(?<![\w.])-?\d[\d.,]*(?:e[+-]?\d+)?", "#", text)
    text = re.sub(chosen, "@", text) if chosen else text
    return [" ".join(re.sub("─+", "─", line).split()) for line in text.strip().splitlines()]


def agrees(expected, printed, chosen=""):
    """Whether the output is the expected one; a line `...` stands for any lines, `…` for the rest of its line."""
    parts = "\n".join(normal(expected, chosen)).split("\n...\n")
    pattern = r"\n(?:.*\n)*".join(map(re.escape, parts)).replace("…", ".*")
    return re.fullmatch(pattern, "\n".join(normal(printed, chosen))) is not None


@pytest.fixture
def downloaded(tmp_path, monkeypatch):
    """A file where torch keeps what it downloads: MobileNetV2 with random weights and statistics that were measured."""
    import torch
    from torchvision.models import MobileNet_V2_Weights, mobilenet_v2

    torch.manual_seed(0)
    net = mobilenet_v2()
    for layer in net.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = None
    with torch.no_grad():
        net(torch.randn(16, 3, 64, 64))
    path = tmp_path / "torch" / "hub" / "checkpoints" / Path(MobileNet_V2_Weights.DEFAULT.url).name
    path.parent.mkdir(parents=True)
    torch.save(net.state_dict(), path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


@pytest.mark.usefixtures("downloaded")
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in NAMES])
def test_a_tutorial_runs_as_it_is_written(name, tmp_path, monkeypatch):
    if name == "deploy-cpp" and shutil.which("c++") is None:
        pytest.skip("there is no C++ compiler named c++ here")
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for expected, printed in results(name, folder):
        assert agrees(expected, printed, CHOSEN.get(name, "")), f"the page says\n{expected}\nand not\n{printed}"


def test_output_is_compared_line_by_line():
    assert agrees("a 1.5 %\n", "a  27 %\n")
    assert agrees("first\n...\nlast 3\n", "first\nx\ny\nlast 4\n")
    assert agrees("a: …\nb\n", "a: c d\nb\n") and not agrees("a: …\n", "a: c\nb\n")
    assert not agrees("a 1\n", "a 1\nb 2\n")
    assert not agrees("a 1\n...\nb\n", "a 1\nc\n")
    assert not agrees("yes 1\n", "no 1\n")


@pytest.mark.parametrize("name", NAMES)
def test_the_cells_of_a_notebook_are_the_blocks_of_its_tutorial(name, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.syspath_prepend(ROOT / "docs" / "site")
    from notebooks import notebook

    page = (ROOT / "docs" / "tutorials" / f"{name}.md").read_text(encoding="utf-8")
    made = nbformat.reads(notebook(page), as_version=4)
    nbformat.validate(made)
    cells = [cell.source for cell in made.cells if cell.cell_type == "code"]
    heads = {"python": "", "bash": "%%bash\n"}
    wanted = [
        (f"%%writefile {block.title}\n" if block.title else heads[block.language]) + block.text.rstrip("\n")
        for block in blocks(name)
        if block.language != "text"
    ]
    assert cells == wanted
    assert notebook(page) == notebook(page)
