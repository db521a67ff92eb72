"""Predictions run with numpy, scipy and safetensors alone; everything else names the package that is missing."""

import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import click
import numpy as np
import pytest
from PIL import Image

import dsr_tool
from converters.loading import load
from dsr_tool.cli import COMMANDS
from dsr_tool.cli.predict import command
from dsr_tool.cli.without_click import parser
from dsr_tool.packages import MissingPackage, needed_by

ROOT = Path(dsr_tool.__file__).parents[1]
CALLS = """
import contextlib, io, json, sys
import dsr_tool.cli
results = []
for arguments in json.loads(sys.stdin.read()):
    sys.argv = ["dsr-tool", *arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            dsr_tool.cli.main()
        except SystemExit as ended:
            results.append([ended.code, out.getvalue(), err.getvalue()])
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def files(archive, folder, onnx_file, tmp_path_factory):
    """A folder with an archive, a plan, an ONNX file, an array and a picture."""
    place = tmp_path_factory.mktemp("files")
    for path in (archive, onnx_file):
        (place / f"net{path.suffix}").write_bytes(path.read_bytes())
    dsr_tool.export(load(folder), place / "net.dsrplan")
    random = np.random.default_rng(0)
    np.save(place / "x.npy", random.standard_normal((3, 64, 64), np.float32))
    Image.fromarray(random.integers(0, 255, (64, 64, 3), np.uint8)).save(place / "cat.png")
    return place


@pytest.fixture(scope="module")
def alone(files, tmp_path_factory):
    """Returns a function that runs Python code in `files` with few packages; Python itself looks for no others."""

    def call(code, *packages, given=""):
        site = tmp_path_factory.mktemp("site")
        for name in ("numpy", "scipy", "safetensors", *packages):
            package = Path(importlib.util.find_spec(name).origin).parent
            for part in (package, package.with_name(f"{name}.libs")):  # wheels keep libraries of others beside them
                if part.exists():
                    (site / part.name).symlink_to(part)
        (metadata,) = Path(distribution("dsr-tool").locate_file("")).glob("dsr_tool-*.dist-info")
        (site / metadata.name).symlink_to(metadata)
        environment = {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{ROOT}"}
        done = subprocess.run(
            [sys.executable, "-S", "-W", "error", "-c", code],
            input=given,
            cwd=files,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return call


def called(alone, lines, *packages):
    """Runs command lines in one process, since each imports scipy; returns exit code, stdout and stderr by line."""
    results = json.loads(alone(CALLS, *packages, given=json.dumps([line.split() for line in lines])))
    return dict(zip(lines, results, strict=True))


RUN = ["predict net.dsr --top 2 x.npy x.npy --json -q", "predict net.dsrplan x.npy --json", "predict --help"]
NEED = {
    "predict net.dsr cat.png": "pillow",
    "predict net.dsrplan cat.png": "pillow",
    "predict net.onnx x.npy": "onnx",
    "predict net.dsr x.npy --runtime onnxruntime": "onnx",
    **dict.fromkeys(["--help", "no-such-command", *(name for name in COMMANDS if name != "predict")], "click"),
}
NEED_WITH_CLICK = {
    "convert resnet18 --sparsity 0.9 -o m": "torch",
    "train m -o run --data digits": "torch",
    "compare grid.toml -o grid": "torch",
    "export m -o y.dsr": "torch",
    "verify net.dsr --against m": "torch",
    "demo": "torch",
    "report net.dsr": "rich",
    "bench net.dsr": "rich",
    "doctor": "packaging",
    "predict net.dsr cat.png": "pillow",
}
WRONG = {
    "predict net.dsr x.npy --threads 0": "0 is not in [1, 256]",
    "predict net.dsr x.npy --top many": "'many'",
    "predict net.dsr": "INPUTS",
    "predict net.dsr x.npy --tpo 3": "--tpo",
    "predict net.dsr x.npy --runtime fast": "known names: onnxruntime, scipy, sparse.",
}


@pytest.fixture(scope="module")
def results(alone):
    """The lines above do as much with numpy, scipy and safetensors alone."""
    return called(alone, [*RUN, *NEED, *WRONG])


def test_predict_runs_with_numpy_scipy_and_safetensors_alone(results, files, run_json, monkeypatch):
    monkeypatch.chdir(files)
    for line in RUN[:2]:
        code, out, err = results[line]
        assert (code, err) == (0, "")
        assert json.loads(out) == run_json(*line.replace("--json", "").split())
    assert "--threads" in results[RUN[2]][1]


def test_what_else_is_called_names_the_missing_package(results):
    assert _named(results, NEED) == NEED
    sentence = "`dsr-tool convert` needs the package click, which is not installed; run: pip install 'click>=8.1.7', or"
    assert sentence in results["convert"][2]


def test_with_click_each_command_names_what_it_needs(alone):
    assert _named(called(alone, NEED_WITH_CLICK, "click"), NEED_WITH_CLICK) == NEED_WITH_CLICK


def _named(results, lines):
    """Returns the package in the sentence of each command line, all of which failed."""
    packages = {}
    for line in lines:
        code, out, err = results[line]
        assert (code, out, err.count("\n")) == (1, "", 1), err
        before, _, package = err.partition(" the package ")
        assert before.startswith("dsr-tool: ") and "install" in package, err
        packages[line] = package.split()[0].rstrip(",")
    return packages


def test_wrong_arguments_are_refused_without_click_too(results):
    for line, part in WRONG.items():
        code, out, err = results[line]
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert part in err


def test_sessions_run_with_numpy_scipy_and_safetensors_alone(alone, files):
    message = alone(
        "import numpy, dsr_tool\n"
        "x = numpy.load('x.npy')[None]\n"
        "numpy.save('archive.npy', dsr_tool.Session('net.dsr').run(x))\n"
        "numpy.save('plan.npy', dsr_tool.PlanSession('net.dsrplan').run(x))\n"
        "numpy.save('scipy.npy', dsr_tool.Session('net.dsr', runtime='scipy').run(x))\n"
        "try:\n    dsr_tool.convert\nexcept ImportError as error:\n    print(error)"
    )
    assert message.startswith("dsr_tool.convert needs the package torch, which is not installed; run: pip install ")
    x = np.load(files / "x.npy")[None]
    assert (np.load(files / "archive.npy") == dsr_tool.Session(files / "net.dsr").run(x)).all()
    assert (np.load(files / "plan.npy") == dsr_tool.PlanSession(files / "net.dsrplan").run(x)).all()
    np.testing.assert_allclose(np.load(files / "scipy.npy"), np.load(files / "archive.npy"), rtol=1e-4, atol=1e-5)


def test_both_readers_of_arguments_agree():
    actions = {action.dest: action for action in parser()._actions if action.dest != "help"}
    parameters = {one.name: one for one in command.params}
    assert actions.keys() == parameters.keys()
    for name, parameter in parameters.items():
        if isinstance(parameter, click.Option):
            assert set(actions[name].option_strings) == set(parameter.opts)
            assert actions[name].help == parameter.help
    given = command.make_context("predict", ["net.dsr", "x.npy"]).params
    assert {**vars(parser().parse_args(["net.dsr", "x.npy"])), "inputs": given["inputs"]} == given | {"quiet": False}


def test_other_failed_imports_are_left_alone():
    with pytest.raises(ModuleNotFoundError) as failed, needed_by("this test"):
        import a_module_of_the_user  # noqa: F401
    assert not isinstance(failed.value, MissingPackage)
    with pytest.raises(ImportError) as failed, needed_by("this test"):
        from torch import no_such_name  # noqa: F401
    assert not isinstance(failed.value, MissingPackage)
