"""The programs of docs/examples: compiled, run on a picture, and compared with a session."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dsr_tool.runtime import Session
from dsr_tool.runtime.deploy.library import include_dir, library

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-pedantic"]
RESIZE, MEAN, STD = 44, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@pytest.fixture(scope="module")
def rgb():
    return np.random.default_rng(5).integers(0, 256, (61, 53, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def picture(tmp_path_factory, rgb):
    path = tmp_path_factory.mktemp("picture") / "picture.ppm"
    path.write_bytes(b"P6\n%d %d\n255\n" % (rgb.shape[1], rgb.shape[0]) + rgb.tobytes())
    return path


def preprocessed(rgb, rows, columns):
    """The short side becomes `RESIZE` pixels, the centre is cut out; bilinear, edges repeated."""
    height, width = rgb.shape[:2]
    scale = np.float32(min(height, width) / RESIZE)

    def positions(count, of):
        return (np.arange(count, dtype=np.float32) + 0.5 - count / 2) * scale + of / 2 - 0.5

    v, u = positions(rows, height)[:, None, None], positions(columns, width)[None, :, None]
    r, k = np.floor(v), np.floor(u)

    def at(row, column):
        row, column = row.clip(0, height - 1).astype(int), column.clip(0, width - 1).astype(int)
        return rgb[row[:, :, 0], column[:, :, 0]].astype(np.float32) / 255

    upper = at(r, k) + (u - k) * (at(r, k + 1) - at(r, k))
    lower = at(r + 1, k) + (u - k) * (at(r + 1, k + 1) - at(r + 1, k))
    found = (upper + (v - r) * (lower - upper) - MEAN) / STD
    return found.transpose(2, 0, 1)[None].astype(np.float32)


def expected(archive, rgb):
    """The five best classes with their probabilities."""
    session = Session(archive, runtime="native")
    (scores,) = session.run(preprocessed(rgb, *session.input.shape[2:]))
    probabilities = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    return [(int(i), float(probabilities[i])) for i in np.argsort(-scores)[:5]]


def check(printed, archive, rgb):
    wanted = expected(archive, rgb)
    lines = [line.split("  ") for line in printed.splitlines()]
    assert [int(number) for _, number, _ in lines] == [number for number, _ in wanted]
    assert [label for _, _, label in lines] == [f"class {number}" for number, _ in wanted]
    np.testing.assert_allclose([float(share) for share, _, _ in lines], [share for _, share in wanted], atol=1e-4)
    # One class for every picture would hide a picture that is read wrong.
    assert len({share for share, _, _ in lines}) == 5


@pytest.fixture(scope="module")
def program(compiler, linked, called, tmp_path_factory):
    path = tmp_path_factory.mktemp("program") / "classify"
    called(compiler, "-std=c++17", *WARNINGS, f"-I{include_dir()}", EXAMPLES / "classify.cpp", "-o", path, *linked)
    return path


def test_the_program_in_cpp_is_short():
    assert len((EXAMPLES / "classify.cpp").read_text(encoding="utf-8").splitlines()) < 60


def test_the_program_in_cpp_names_the_classes_that_a_session_names(program, called, plan_path, archives, picture, rgb):
    check(called(program, plan_path, picture), archives["gated"], rgb)


def test_a_photograph_of_another_size_is_cut_in_the_middle(program, called, plan_path, archives, tmp_path):
    wide = np.random.default_rng(6).integers(0, 256, (30, 97, 3)).astype(np.uint8)
    (tmp_path / "wide.ppm").write_bytes(b"P6 97 30 255\n" + wide.tobytes())
    check(called(program, plan_path, tmp_path / "wide.ppm"), archives["gated"], wide)


def test_the_program_says_what_is_wrong_in_one_sentence(program, plan_path, picture, tmp_path):
    (tmp_path / "text").write_text("P3 no picture")
    (tmp_path / "short.ppm").write_bytes(picture.read_bytes()[:-1])
    for arguments, why in [
        ([], "give a plan and a picture"),
        ([tmp_path / "none.dsrplan", picture], "cannot be opened"),
        ([picture, picture], "it is no plan file"),
        ([plan_path, tmp_path / "text"], "no PPM file"),
        ([plan_path, tmp_path / "short.ppm"], "cut off"),
    ]:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        assert why in done.stderr


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler named c++ here")
def test_the_commands_of_the_page_compile_and_run_it(called, plan_path, archives, picture, rgb, tmp_path):
    lines = [line.strip() for line in (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8").splitlines()]
    last = lines.index("./classify model.dsrplan picture.ppm")
    first = next(i for i, line in enumerate(lines) if line.startswith("INCLUDE="))
    script = "\n".join(lines[first : last + 1])
    for name, path in [("picture.ppm", picture), ("model.dsrplan", plan_path), ("docs/", f"{ROOT}/docs/")]:
        script = script.replace(name, str(path))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    check(
        called("env", f"PATH={path}", f"PYTHONPATH={ROOT}", "sh", "-ec", f"cd {tmp_path}\n{script}"),
        archives["gated"],
        rgb,
    )


@pytest.mark.skipif(shutil.which("rustc") is None, reason="there is no Rust compiler here")
def test_the_program_in_rust_names_the_same_classes(called, plan_path, archives, picture, rgb, tmp_path):
    folder = library().parent
    options = ["--edition", "2021", "-D", "warnings", "-L", folder, "-C", f"link-arg=-Wl,-rpath,{folder}"]
    called("rustc", EXAMPLES / "classify.rs", "-o", tmp_path / "classify", *options)
    check(called(tmp_path / "classify", plan_path, picture), archives["gated"], rgb)


@pytest.mark.parametrize("language", ["c", "c++"])
@pytest.mark.parametrize("standard", ["99", "17"])
def test_the_header_is_plain_in_every_standard(compiler, called, language, standard, tmp_path):
    source = tmp_path / "uses.c"
    source.write_text("#include <dsr.h>\n#include <dsr.h>\nint main(void) { return dsr_input_count(0); }\n")
    name = {"c": f"c{standard}", "c++": f"c++{standard.replace('99', '98')}"}[language]
    # stdint.h belongs to C++11 and later; compilers have it before.
    called(compiler, "-x", language, f"-std={name}", *WARNINGS, f"-I{include_dir()}", "-fsyntax-only", source)
