"""The operator SparsePlan in ONNX Runtime computes what its plan computes, and refuses what it cannot run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from onnx import numpy_helper  # noqa: E402

import dsr_tool  # noqa: E402
from dsr_tool.runtime.deploy.library import level_rows  # noqa: E402
from dsr_tool.runtime.deploy.plan import PlanFile  # noqa: E402
from exporters.onnx.native import wrapped  # noqa: E402

X = np.random.default_rng(3).standard_normal((8, 1, 3, 40, 36)).astype(np.float32)
NAMES = ["gated", "few bits", "heads"]


@pytest.fixture(scope="module")
def plan(plan_of):
    return plan_of()


@pytest.fixture(scope="module")
def model(plan):
    return wrapped(plan, "Net")


def open_session(model, *libraries, threads=None, **options):
    """Opens a model; `options` are entries of its configuration."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    settings.log_severity_level = 4
    for name, value in {**options, **({} if threads is None else {"dsr_tool.threads": str(threads)})}.items():
        settings.add_session_config_entry(name, value)
    for path in libraries or (dsr_tool.ort_library(),):
        settings.register_custom_ops_library(str(path))
    content = model if isinstance(model, bytes) else model.SerializeToString()
    return onnxruntime.InferenceSession(content, settings, providers=["CPUExecutionProvider"])


def run(session, x):
    """Returns the outputs by name, as bytes."""
    found = session.run(None, {session.get_inputs()[0].name: x})
    return {value.name: array.tobytes() for value, array in zip(session.get_outputs(), found, strict=True)}


def wanted(plan, x):
    return {name: array.tobytes() for name, array in PlanFile(plan).run(x).items()}


def changed(model, change):
    """Returns a copy of a model that a function has changed."""
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    change(copied.graph)
    return copied


def with_plan(model, content):
    stored = numpy_helper.from_array(np.frombuffer(content, np.uint8), model.graph.initializer[0].name)
    return changed(model, lambda graph: graph.initializer[0].CopyFrom(stored))


def test_the_model_is_valid_and_says_what_it_is(model):
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["SparsePlan"]
    assert "ort_library" in model.doc_string and model.producer_name == "dsr-tool"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("threads", [1, 3])
def test_outputs_are_those_of_the_plan_bit_for_bit(plan_of, name, threads):
    content = plan_of(name)
    session = open_session(wrapped(content, name), threads=threads)
    for x in X[:2]:
        assert run(session, x) == wanted(content, x)


def test_a_batch_of_several_inputs_is_one_run(plan_of):
    content = plan_of(batch=4)
    x = X[:4, 0]
    assert run(open_session(wrapped(content, "Net")), x) == wanted(content, x)


def test_a_session_runs_from_several_threads(plan, model):
    session = open_session(model, threads=2)
    expected = [wanted(plan, x) for x in X]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            assert list(pool.map(lambda x: run(session, x), X)) == expected


def test_sessions_are_independent(plan_of, plan, model):
    others = [open_session(model), open_session(wrapped(plan_of("heads"), "heads"), threads=2), open_session(model)]
    first = others.pop(0)
    expected = wanted(plan, X[0])
    assert run(others[1], X[0]) == expected
    del others
    assert run(first, X[0]) == expected


def test_bound_outputs_are_written_in_place(plan, model):
    session = open_session(model)
    (x,), (y,) = session.get_inputs(), session.get_outputs()
    given = onnxruntime.OrtValue.ortvalue_from_numpy(X[0])
    result = onnxruntime.OrtValue.ortvalue_from_shape_and_type(y.shape, np.float32)
    binding = session.io_binding()
    binding.bind_ortvalue_input(x.name, given)
    binding.bind_ortvalue_output(y.name, result)
    session.run_with_iobinding(binding)
    assert binding.get_outputs()[0].data_ptr() == result.data_ptr()
    assert result.numpy().tobytes() == wanted(plan, X[0])[y.name]


def test_two_copies_of_the_library_and_a_second_registration_do_no_harm(plan, model, tmp_path):
    own, other = dsr_tool.ort_library(), tmp_path / f"copy{dsr_tool.ort_library().suffix}"
    shutil.copy(own, other)
    expected = wanted(plan, X[0])
    for libraries in ((other,), (own, own), (own, other)):
        assert run(open_session(model, *libraries), X[0]) == expected
    both = [open_session(model, path, threads=2) for path in (own, other)]
    assert [run(session, X[0]) for session in both] == [expected, expected]


def _tasks():
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_a_kernel_has_the_threads_of_the_entry_or_else_of_the_attribute(model):
    def threaded(graph):
        graph.node[0].attribute.append(onnx.helper.make_attribute("threads", 4))

    before = _tasks()
    for source, threads, more in (
        (model, None, 0),
        (model, 3, 2),
        (changed(model, threaded), None, 3),
        (changed(model, threaded), 2, 1),
    ):
        session = open_session(source, threads=threads)
        run(session, X[0])
        assert _tasks() - before == more
        del session
        assert _tasks() == before


FORKED = """
import os, sys, numpy as np, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
options.add_session_config_entry("dsr_tool.threads", "2")
options.register_custom_ops_library(sys.argv[1])
session = onnxruntime.InferenceSession(sys.argv[2], options, providers=["CPUExecutionProvider"])
x = np.load(sys.argv[3])
first = session.run(None, {"x": x})[0].tobytes()
child = os.fork()
same = session.run(None, {"x": x})[0].tobytes() == first
if not child:
    os._exit(0 if same else 1)
assert same and os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_goes_on_with_a_session(model, tmp_path):
    onnx.save(model, tmp_path / "net.onnx")
    np.save(tmp_path / "x.npy", X[0])
    script = [sys.executable, "-W", "ignore", "-c", FORKED]
    arguments = [str(dsr_tool.ort_library()), str(tmp_path / "net.onnx"), str(tmp_path / "x.npy")]
    done = subprocess.run([*script, *arguments], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def refused(model, match, x=None, **options):
    """Asserts that a model is refused when it is opened, or run, by one sentence of ours."""
    with pytest.raises(Exception, match=match) as caught:
        session = open_session(model, **options)
        assert x is not None, "it was opened"
        run(session, x)
    message = str(caught.value)
    assert message.count("dsr-tool: ") == 1 and "\n" not in message.strip()


def test_damaged_plans_are_refused(plan, model):
    flipped = bytearray(plan)
    flipped[len(plan) // 2] ^= 1
    for content, match in (
        (bytes(flipped), "the plan is damaged: its checksum does not fit"),
        (plan[:-8], "bytes instead of"),
        (plan[:20], "it is no plan file"),
        (b"", "is NULL|it is no plan file"),
        (b"text" * 20, "it is no plan file"),
    ):
        refused(with_plan(model, content), match)


def test_a_plan_for_other_processors_is_refused(plan_of, model):
    others = tuple(row.name for row in level_rows() if not row.runs)
    if not others:
        pytest.skip("this processor runs every level of the library")
    refused(with_plan(model, plan_of(levels=others)), f"the plan is for processors with {', '.join(others)}")


def test_a_plan_that_is_computed_is_refused(model, plan):
    def computed(graph):
        graph.input.append(onnx.helper.make_tensor_value_info(graph.initializer[0].name, 2, [len(plan)]))
        del graph.initializer[:]

    refused(changed(model, computed), "make it an initializer")


def test_a_node_with_other_inputs_or_outputs_than_its_plan_is_refused(model):
    refused(changed(model, lambda graph: graph.node[0].input.append("x")), "3 inputs and 1 outputs; its plan takes 1")
    refused(changed(model, lambda graph: graph.node[0].output.append("more")), "2 inputs and 2 outputs")


def test_inputs_of_another_shape_are_refused(model):
    def free(graph):
        for dim in graph.input[0].type.tensor_type.shape.dim:
            dim.dim_param = "any"

    def ranked(graph):
        graph.input[0].type.tensor_type.ClearField("shape")

    refused(changed(model, free), r"input 'x' has rank 4 and shape \(2, 3, 40, 36\)", x=X[:2, 0])
    refused(changed(model, ranked), "input 'x' has rank 3", x=X[0, 0])
    refused(changed(model, ranked), "input 'x' has rank 9", x=np.zeros((1,) * 9, np.float32))
    refused(changed(model, free), "input 'x' has", x=np.zeros((0, 3, 40, 36), np.float32))


@pytest.mark.parametrize("threads", ["0", "-1", "257", "two", "", "1" * 400])
def test_threads_that_are_no_number_of_threads_are_refused(model, threads):
    refused(model, "dsr_tool.threads", threads=threads)


@pytest.mark.parametrize("threads", [0, -5, 257, (1 << 32) + 1])
def test_an_attribute_out_of_range_is_refused(model, threads):
    def threaded(graph):
        graph.node[0].attribute.append(onnx.helper.make_attribute("threads", threads))

    refused(changed(model, threaded), r"is not in \[1, 256\]")


def test_without_the_library_the_operator_is_named(model):
    with pytest.raises(Exception, match="SparsePlan.* is not a registered function/op"):
        onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def test_the_package_names_the_library_and_its_header():
    assert dsr_tool.ort_library() == dsr_tool.library()
    assert (dsr_tool.include_dir() / "dsr.h").is_file()
    assert isinstance(dsr_tool.library(), Path) and dsr_tool.library().is_file()
