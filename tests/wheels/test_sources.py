"""The sdist and a wheel without kernels hold all sources, and nothing that was built in the checkout."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("hatchling")

ROOT = Path(__file__).parents[2]
PACKAGES = ("dsr_tool", "converters", "exporters")
BUILT = {".so", ".dylib", ".dll", ".o", ".pyc"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder with an sdist and a wheel of this checkout."""
    folder = tmp_path_factory.mktemp("dist")
    options = ("--target", "sdist", "--target", "wheel", "--directory", folder)
    command = [sys.executable, "-m", "hatchling", "build", *options]
    environment = {**os.environ, "DSR_TOOL_KERNELS": "none"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_both_hold_every_source_and_nothing_that_was_built(made):
    (wheel,), (sdist,) = made.glob("*-py3-none-any.whl"), made.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = set(archive.namelist())
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    files = {path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()}
    sources = {path.relative_to(ROOT).as_posix() for path in files if not _is_built(path.name)}
    assert {"dsr_tool/runtime/deploy/include/dsr.h", "dsr_tool/runtime/kernels/ops.def"} <= sources
    assert sources <= in_wheel
    assert sources | {"hatch_build.py", "pyproject.toml", "README.md", "LICENSE"} <= in_sdist
    assert any(name.endswith("/licenses/LICENSE") for name in in_wheel)
    assert not [name for name in in_wheel | in_sdist if _is_built(name)]


def _is_built(name):
    return Path(name).suffix in BUILT or name.endswith("_kernels.json")
