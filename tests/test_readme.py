"""Commands and code in the README run as they are written."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from dsr_tool.cli.group import cli

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
CSR, LOOP = re.findall(r"```python\n(.*?)```", README, re.S)
COMMANDS = re.findall(r"^    (dsr-tool .*)$", README, re.M)


def test_the_training_loop_runs(tmp_path):
    _run(LOOP, tmp_path)
    assert (tmp_path / "net.dsr").exists()


def _run(code, folder):
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_and_options_exist(line):
    _, name, *arguments = shlex.split(line)
    command = cli.get_command(click.Context(cli), name)
    command.make_context(name, arguments)


NEEDS_MORE = re.compile(r"--weights DEFAULT|mobilenet-70")
"""Commands that need downloaded weights, or pictures of the user's own."""


@pytest.mark.slow
def test_the_main_job_runs_as_written(tmp_path):
    for line in re.findall(r"^    ((?:dsr-tool|python) .*)$", README, re.M):
        if NEEDS_MORE.search(line):
            continue
        arguments = shlex.split(line)
        arguments[0] = str(Path(sys.executable).parent / arguments[0])
        done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (line, done.stderr)
        if "predict" in line:
            assert re.search(r"^seven.png: 7 ", done.stdout, re.M)
    _run(CSR, tmp_path)
