"""Our declarations of ONNX Runtime's C interface agree with its header, where that is installed."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from dsr_tool.runtime.deploy.library import include_dir

HEADER = "onnxruntime_c_api.h"
FOLDERS = [Path(one) for one in os.environ.get("ORT_INCLUDE", "").split(os.pathsep) if one]
FOLDERS += [Path(root) / sub for root in ("/usr/include", "/usr/local/include") for sub in ("onnxruntime", ".")]
FOLDERS += [one / "core" / "session" for one in FOLDERS]
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
FIELDS = {
    "create_kernel": "CreateKernel",
    "name": "GetName",
    "provider": "GetExecutionProviderType",
    "input_type": "GetInputType",
    "input_count": "GetInputTypeCount",
    "output_type": "GetOutputType",
    "output_count": "GetOutputTypeCount",
    "compute": "KernelCompute",
    "destroy": "KernelDestroy",
    "input_characteristic": "GetInputCharacteristic",
    "output_characteristic": "GetOutputCharacteristic",
    "input_memory": "GetInputMemoryType",
    "least_inputs": "GetVariadicInputMinArity",
    "same_inputs": "GetVariadicInputHomogeneity",
    "least_outputs": "GetVariadicOutputMinArity",
    "same_outputs": "GetVariadicOutputHomogeneity",
    "create_kernel_or_fail": "CreateKernelV2",
    "compute_or_fail": "KernelComputeV2",
}
"""Fields of our struct of an operator, and their names in the header."""
VALUES = {
    "FAIL": "ORT_FAIL",
    "INVALID_ARGUMENT": "ORT_INVALID_ARGUMENT",
    "UNDEFINED": "ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED",
    "FLOAT": "ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT",
    "UINT8": "ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8",
    "REQUIRED": "INPUT_OUTPUT_REQUIRED",
    "VARIADIC": "INPUT_OUTPUT_VARIADIC",
    "DEFAULT": "OrtMemTypeDefault",
}

# Types of the two sides have different names, so functions are compared by the sizes of their arguments and results.
PROGRAM = """
#include "onnxruntime_c_api.h"
#include "onnxruntime.h"
template <class T> constexpr long size_of = sizeof(T);
template <> constexpr long size_of<void> = 0;
template <class F> struct Shape;
template <class R, class... A> struct Shape<R (*)(A...)> {
    static constexpr long value(long sum = size_of<R>) { return ((sum = sum * 16 + size_of<A>), ..., sum); }
};
template <class R, class... A> struct Shape<R (*)(A...) noexcept> : Shape<R (*)(A...)> {};
using namespace dsr;
#define FUNCTION(position, result, name, arguments)                                 \\
    static_assert(offsetof(OrtApi, name) == (position) * sizeof(void*), #name);    \\
    static_assert(Shape<decltype(OrtApi::name)>::value() == Shape<decltype(ort::Api::name)>::value(), #name);
ORT_FUNCTIONS(FUNCTION)
static_assert(offsetof(OrtApiBase, GetApi) == offsetof(ort::ApiBase, get_api));
static_assert(offsetof(OrtApiBase, GetVersionString) == offsetof(ort::ApiBase, get_version_string));
static_assert(offsetof(OrtCustomOp, version) == offsetof(ort::Operator, version));
static_assert(sizeof(ort::Operator) == offsetof(OrtCustomOp, KernelComputeV2) + sizeof(void*));
static_assert(ORT_API_VERSION >= ort::VERSION);
"""


def _program(fields=FIELDS, values=VALUES):
    lines = [PROGRAM]
    for ours, theirs in fields.items():
        lines.append(f"static_assert(offsetof(OrtCustomOp, {theirs}) == offsetof(ort::Operator, {ours}));")
        lines.append(
            f"static_assert(Shape<decltype(OrtCustomOp::{theirs})>::value() == "
            f"Shape<decltype(ort::Operator::{ours})>::value());"
        )
    lines += [f"static_assert((int){theirs} == (int)ort::{ours});" for ours, theirs in values.items()]
    return "\n".join(lines)


def _compile(program, folder, tmp_path):
    source = tmp_path / "compare.cpp"
    source.write_text(program, encoding="utf-8")
    ours = include_dir().parent
    command = [COMPILER, "-std=c++17", "-fsyntax-only", f"-I{folder}", f"-I{ours}", str(source)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def folder():
    if COMPILER is None:
        pytest.skip("needs a C++ compiler")
    found = next((one for one in FOLDERS if (one / HEADER).is_file()), None)
    if found is None:
        pytest.skip(f"needs {HEADER}, e.g. of Debian's libonnxruntime-dev; ORT_INCLUDE names its folder")
    return found


def test_positions_types_and_fields_are_those_of_the_header(folder, tmp_path):
    done = _compile(_program(), folder, tmp_path)
    assert done.returncode == 0, done.stderr


def test_another_order_of_fields_would_be_seen(folder, tmp_path):
    swapped = {**FIELDS, "input_count": "GetOutputType", "output_type": "GetInputTypeCount"}
    assert _compile(_program(swapped), folder, tmp_path).returncode != 0
