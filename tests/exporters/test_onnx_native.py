"""Exports of one operator for ONNX Runtime: verified, refused where weights are read, and run as docs/onnx.md shows."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import dsr_tool
from dsr_tool.cli.group import cli
from dsr_tool.errors import CheckFailed, FormatError, UsageError
from dsr_tool.runtime.deploy.plan import PlanFile
from dsr_tool.sparse.sparsify import sparsify
from dsr_tool.sparse.trace import trace
from dsr_tool.sparsity.budget import Budget
from dsr_tool.sparsity.config import ModelConfig
from exporters.export import export, export_onnx, verify
from exporters.onnx.native import plan_of

try:
    dsr_tool.library()
except UsageError as error:
    pytest.skip(str(error), allow_module_level=True)

PAGE = (Path(__file__).parents[2] / "docs" / "onnx.md").read_text(encoding="utf-8")
SECTION = PAGE.split("## Our kernels inside ONNX Runtime")[1].split("\n## ")[0]
SHAPE = (3, 24, 20)
X = np.random.default_rng(2).standard_normal((1, *SHAPE)).astype(np.float32)


def network(seed=0):
    torch.manual_seed(seed)
    layers = nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Conv2d(24, 40, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(40, 9),
    )
    config = ModelConfig("module", "Small", 9, SHAPE)
    return sparsify(layers, config, Budget(sparsity=0.8), positions="random")


@pytest.fixture(scope="module", autouse=True)
def _traced_once():
    """Exports use one graph of the network, which saves a second for each."""
    graph = trace(network().module, SHAPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("exporters.checked.trace", lambda module, shape: graph)
        yield


@pytest.fixture(scope="module")
def model():
    return network()


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("native") / "model.onnx"
    export(model, path, encoding="native")
    return path


@pytest.mark.parametrize("options", [{"batch": 2}, {"values": "fp16"}, {"values": "int8"}, {"compact": True}], ids=str)
def test_an_export_is_compared_with_the_model_in_onnxruntime(model, tmp_path, options):
    found = export(model, tmp_path / "m.onnx", encoding="native", **options)
    assert found.kind == "onnx" and found.passed
    assert [name.split(",")[0] for name in found.runtimes] == ["onnxruntime"]
    assert any("compared by the outputs alone" in note for note in found.notes)
    again = verify(tmp_path / "m.onnx", model)
    assert again.passed and again.runtimes == found.runtimes
    session = dsr_tool.onnx_session(tmp_path / "m.onnx", threads=1)
    assert session.get_inputs()[0].shape == [options.get("batch", 1), *SHAPE]


def test_a_file_of_other_weights_is_no_file_of_the_model(file):
    assert not verify(file, network(seed=1)).passed


def test_a_damaged_file_is_refused(file, model, tmp_path):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises((CheckFailed, FormatError), match="damaged"):
        verify(tmp_path / "m.onnx", model)
    with pytest.raises(FormatError, match="the plan is damaged"):
        dsr_tool.onnx_session(tmp_path / "m.onnx")


def test_onnx_session_takes_threads_and_runs_the_plan(file):
    expected = PlanFile(plan_of(file)).run(X)["output"]
    for threads in (1, 2, None):
        (found,) = dsr_tool.onnx_session(file, threads=threads).run(None, {"input": X})
        assert found.tobytes() == expected.tobytes()


def test_readers_of_weights_refuse_the_file_in_one_sentence(file, tmp_path):
    with pytest.raises(UsageError, match="holds a plan for ONNX Runtime"):
        dsr_tool.Session(file)
    np.save(tmp_path / "x.npy", X)
    for command in (["report"], ["predict", "x.npy"], ["bench"]):
        arguments = [command[0], str(file), *(str(tmp_path / name) for name in command[1:])]
        done = CliRunner().invoke(cli, arguments)
        assert isinstance(done.exception, UsageError)
        assert "holds a plan for ONNX Runtime" in str(done.exception)
    for target, encoding in (("d.onnx", "dense"), ("m.dsr", "auto")):
        with pytest.raises(UsageError, match="holds a plan for ONNX Runtime"):
            export_onnx(file, tmp_path / target, encoding=encoding)
        assert not (tmp_path / target).exists()


def test_the_python_of_the_page_runs(file, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", SECTION, re.S)
    shutil.copy(file, tmp_path / "model.onnx")
    code = code.replace("3, 224, 224", ", ".join(map(str, SHAPE))) + "\nprint(*scores[0])\n"
    printed = _called(tmp_path, sys.executable, "-W", "error", "-c", code)
    expected = PlanFile(plan_of(file)).run(np.zeros_like(X))["output"][0]
    np.testing.assert_array_equal(np.array(printed.split(), np.float32), expected)


# --- the program in C++, with the real header where it is installed ---

POSITIONS = {
    0: "OrtStatus* (*CreateStatus)(int, const char*)",
    2: "const char* (*GetErrorMessage)(const OrtStatus*)",
    3: "OrtStatus* (*CreateEnv)(int, const char*, OrtEnv**)",
    7: "OrtStatus* (*CreateSession)(const OrtEnv*, const char*, const OrtSessionOptions*, OrtSession**)",
    9: "OrtStatus* (*Run)(OrtSession*, const OrtRunOptions*, const char* const*, const OrtValue* const*, size_t, "
    "const char* const*, size_t, OrtValue**)",
    10: "OrtStatus* (*CreateSessionOptions)(OrtSessionOptions**)",
    49: "OrtStatus* (*CreateTensorWithDataAsOrtValue)(const OrtMemoryInfo*, void*, size_t, const int64_t*, size_t, "
    "int, OrtValue**)",
    51: "OrtStatus* (*GetTensorMutableData)(OrtValue*, void**)",
    64: "OrtStatus* (*GetTensorShapeElementCount)(const OrtTensorTypeAndShapeInfo*, size_t*)",
    65: "OrtStatus* (*GetTensorTypeAndShape)(const OrtValue*, OrtTensorTypeAndShapeInfo**)",
    69: "OrtStatus* (*CreateCpuMemoryInfo)(int, int, OrtMemoryInfo**)",
    92: "void (*ReleaseEnv)(OrtEnv*)",
    94: "void (*ReleaseMemoryInfo)(OrtMemoryInfo*)",
    95: "void (*ReleaseSession)(OrtSession*)",
    96: "void (*ReleaseValue)(OrtValue*)",
    99: "void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo*)",
    100: "void (*ReleaseSessionOptions)(OrtSessionOptions*)",
    130: "OrtStatus* (*AddSessionConfigEntry)(OrtSessionOptions*, const char*, const char*)",
    228: "OrtStatus* (*RegisterCustomOpsLibrary_V2)(OrtSessionOptions*, const char*)",
}
"""Functions of ONNX Runtime's table that the program calls, by position."""
OPAQUE = ["Env", "MemoryInfo", "RunOptions", "Session", "SessionOptions", "Status", "TensorTypeAndShapeInfo", "Value"]


def _header():
    """A stand-in for onnxruntime_c_api.h: what the program uses of it."""
    lines = ["#include <cstddef>", "#include <cstdint>", "#define ORT_API_VERSION 16"]
    lines += [f"struct Ort{name};" for name in OPAQUE]
    lines += ["enum { ORT_LOGGING_LEVEL_WARNING = 2, OrtArenaAllocator = 1, OrtMemTypeDefault = 0 };"]
    lines += ["enum { ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT = 1 };", "struct OrtApi {"]
    for number in range(max(POSITIONS) + 1):
        lines.append(f"    {POSITIONS.get(number, f'void* unused_{number}')};")
    lines += ["};", "struct OrtApiBase { const OrtApi* (*GetApi)(uint32_t); const char* (*GetVersionString)(); };"]
    return "\n".join([*lines, 'extern "C" const OrtApiBase* OrtGetApiBase();', ""])


def _called(folder, *command, stdin=None):
    arguments = [str(word) for word in command]
    done = subprocess.run(arguments, cwd=folder, input=stdin, capture_output=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return done.stdout.decode()


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The program of the page, compiled for the library in the package onnxruntime."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler here")
    package = Path(pytest.importorskip("onnxruntime").__file__).parent / "capi"
    library = next(package.glob("libonnxruntime.so.*"), None)
    if library is None:
        pytest.skip(f"{str(package)!r} holds no libonnxruntime.so")
    folder = tmp_path_factory.mktemp("program")
    (folder / "onnxruntime_c_api.h").write_text(_header(), encoding="utf-8")
    # The name that programs ask the loader for has the first number of the version alone.
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (folder / name).symlink_to(library)
    (code,) = re.findall(r"```cpp\n(.*?)```", SECTION, re.S)
    (folder / "program.cpp").write_text(code.replace("3, 224, 224", ", ".join(map(str, SHAPE))), encoding="utf-8")
    warnings = ["-Wall", "-Wextra", "-Werror"]
    include = os.environ.get("ORT_INCLUDE", str(folder))
    linked = [f"-I{include}", "program.cpp", "-o", "program", f"-L{folder}", "-lonnxruntime", f"-Wl,-rpath,{folder}"]
    _called(folder, compiler, "-std=c++17", *warnings, *linked)
    return folder / "program"


def test_the_program_of_the_page_computes_what_python_computes(program, file):
    printed = _called(file.parent, program, dsr_tool.ort_library(), file, stdin=X.tobytes())
    expected = PlanFile(plan_of(file)).run(X)["output"][0]
    np.testing.assert_array_equal(np.array(printed.split(), np.float32), expected)


def test_the_program_reports_a_damaged_plan(program, file, tmp_path):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "m.onnx").write_bytes(content)
    command = [str(program), str(dsr_tool.ort_library()), str(tmp_path / "m.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "dsr-tool: the plan is damaged" in done.stderr
