"""Commands and code in the README, and on the page of all commands, run as they are written."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
from PIL import Image

from dsr_tool.cli.group import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
USING = (ROOT / "docs" / "using.md").read_text(encoding="utf-8")
CSR, LOOP = re.findall(r"```python\n(.*?)```", USING, re.S)
LINE = re.compile(r"^    ((?:dsr-tool|python) .*)$", re.M)


def test_the_training_loop_runs(tmp_path):
    _python(LOOP, tmp_path)
    assert (tmp_path / "net.dsr").exists()


@pytest.mark.parametrize("line", [*LINE.findall(README), *LINE.findall(USING)])
def test_commands_and_options_exist(line):
    program, name, *arguments = shlex.split(line)
    if program == "dsr-tool":
        command = cli.get_command(click.Context(cli), name)
        command.make_context(name, arguments)


@pytest.mark.slow
def test_the_job_without_data_runs_as_written(tmp_path):
    for line in LINE.findall(USING):
        done = _run(line, tmp_path)
        if "predict" in line:
            assert re.search(r"^seven.png: 7 ", done, re.M)
    _python(CSR, tmp_path)


@pytest.mark.slow
def test_the_job_with_trained_weights_runs_as_written(tmp_path):
    """The weights are those of a fresh network, under the name of torchvision's download; the photographs are noise."""
    import torch
    import torchvision

    module = torchvision.models.resnet18()
    # Statistics of a network that was trained: those of a fresh one would be refused as never measured.
    module(torch.randn(8, 3, 64, 64))
    url = torchvision.models.get_model_weights("resnet18").DEFAULT.url
    store = tmp_path / "torch" / "hub" / "checkpoints"
    store.mkdir(parents=True)
    torch.save(module.state_dict(), store / Path(url).name)
    random = np.random.default_rng(0)
    for name in ("train/ants", "train/bees", "val/ants", "val/bees"):
        folder = tmp_path / "photographs" / name
        folder.mkdir(parents=True)
        for i in range(16):
            Image.fromarray(random.integers(0, 255, (96, 96, 3), np.uint8)).save(folder / f"{i}.jpg")
    for line in LINE.findall(README):
        _run(line, tmp_path, TORCH_HOME=str(tmp_path / "torch"))
    assert (tmp_path / "ants-80.dsr").exists()


def _run(line, folder, **environment):
    arguments = shlex.split(line)
    arguments[0] = str(Path(sys.executable).parent / arguments[0])
    done = subprocess.run(
        arguments, cwd=folder, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert done.returncode == 0, (line, done.stderr)
    return done.stdout


def _python(code, folder):
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
