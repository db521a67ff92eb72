import json
import subprocess
import sys

import pytest


@pytest.fixture
def run_json(run):
    def call(*arguments):
        code, out, err = run(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    return call


@pytest.fixture
def python():
    """Returns a function that runs Python code in a fresh process."""

    def call(code):
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    return call


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Returns the folder of a small converted model."""
    from converters.conversion import convert

    path = tmp_path_factory.mktemp("models") / "net"
    convert("squeezenet1_1", sparsity=0.9, num_classes=5, input_size=64).save(path)
    return path


@pytest.fixture(scope="session")
def archive(folder):
    from converters.loading import load
    from exporters.export import export

    path = folder.with_suffix(".dsr")
    export(load(folder), path)
    return path


@pytest.fixture(scope="session")
def onnx_file(folder):
    from converters.loading import load
    from exporters.export import export

    path = folder.with_suffix(".onnx")
    export(load(folder), path)
    return path
