"""Sessions of ONNX files compute what sessions of archives compute, or refuse the file in one sentence."""

import subprocess
import sys

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from dsr_tool.errors import FileError, FormatError, UsageError
from dsr_tool.formats.archive import write_archive
from dsr_tool.runtime import Session
from exporters.onnx.graph import open_onnx
from exporters.onnx.session import OnnxSession
from exporters.onnx.write import ONNX_ENCODINGS, to_onnx
from exporters.values import GRID_BITS, VALUES, stored_as

OPSET = helper.make_opsetid("", 18)


def model(nodes, weights=(), inputs=("x",), shape=("n", 3, 6, 6), kind=TensorProto.FLOAT):
    values = [helper.make_tensor_value_info(name, kind, shape) for name in inputs]
    result = [helper.make_tensor_value_info("y", kind, ["n", "c", "h", "w"])]
    initializers = [numpy_helper.from_array(array, name) for name, array in weights]
    graph = helper.make_graph(nodes, "g", values, result, initializers)
    return helper.make_model(graph, opset_imports=[OPSET], ir_version=10)


def written(tmp_path, content):
    path = tmp_path / "model.onnx"
    path.write_bytes(content.SerializeToString())
    return path


@pytest.fixture(scope="module")
def traced():
    from converters.conversion import convert
    from dsr_tool.sparse.trace import trace

    network = convert("squeezenet1_1", sparsity=0.9, num_classes=4, input_size=32)
    return network, trace(network.module, network.config.input_shape)


@pytest.fixture(scope="module")
def archives(traced, tmp_path_factory):
    """Returns archives of the same network, by the type of their values."""
    network, graph = traced
    found = {}
    for values in VALUES:
        found[values] = tmp_path_factory.mktemp("archive") / f"{values}.dsr"
        tensors = stored_as(network.tensors(), network.specs, values)
        write_archive(found[values], tensors, network.specs, graph, network.config)
    return found


X = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)


@pytest.mark.parametrize("runtime", ["auto", "scipy"])
@pytest.mark.parametrize("encoding", ONNX_ENCODINGS)
@pytest.mark.parametrize("values", VALUES)
def test_a_session_of_every_encoding_computes_what_the_archive_does(
    tmp_path, traced, archives, encoding, values, runtime
):
    network, graph = traced
    if encoding == "coo" and values in GRID_BITS:
        with pytest.raises(UsageError, match="not weights in few bits"):
            to_onnx(graph, network.tensors(), encoding=encoding, values=values, specs=network.specs)
        return
    content = to_onnx(graph, network.tensors(), encoding=encoding, values=values, specs=network.specs)
    path = written(tmp_path, content)
    session, other = Session(path, batch=2, runtime=runtime), Session(archives[values], batch=2, runtime=runtime)
    assert (session.runtime, session.input.shape) == (other.runtime, other.input.shape)
    found = session.run(X)
    # An ONNX file leaves out codes of zero, and kernels then add up in another order.
    tolerance = 1e-5 * np.abs(found).max() if values in GRID_BITS else 0
    np.testing.assert_allclose(found, other.run(X), rtol=0, atol=tolerance)
    expected = OnnxSession(path, threads=1).run(X)
    np.testing.assert_allclose(session.run(X), expected, atol=1e-5 * np.abs(expected).max())
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("encoding", ONNX_ENCODINGS)
def test_the_description_is_the_same_in_every_encoding(tmp_path, traced, encoding):
    network, graph = traced
    found = open_onnx(written(tmp_path, to_onnx(graph, network.tensors(), encoding=encoding, architecture="squeeze")))
    # The positions of compact weights are not carried along as constants.
    assert sum(array.nbytes for array in found.graph.constants.values()) < 10_000
    assert set(found.graph.parameters) == set(graph.parameters)
    assert (found.config.architecture, found.config.num_classes) == ("squeeze", 4)
    assert found.config.input_shape == (3, 32, 32)


def test_a_file_of_another_tool_is_run(tmp_path):
    weight = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)
    path = written(tmp_path, model([helper.make_node("Conv", ["x", "w"], ["y"])], [("w", weight)]))
    x = np.ones((1, 3, 6, 6), np.float32)
    for source in (path, str(path), open_onnx(path)):
        np.testing.assert_allclose(Session(source).run(x), OnnxSession(path).run(x), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(open_onnx(path).tensor("w").to_dense(), weight)


def test_two_inputs_are_refused(tmp_path):
    path = written(tmp_path, model([helper.make_node("Add", ["x", "z"], ["y"])], inputs=("x", "z")))
    with pytest.raises(UsageError, match="takes 2 inputs"):
        Session(path)


def test_a_name_that_nothing_defines_is_refused(tmp_path):
    path = written(tmp_path, model([helper.make_node("Relu", ["nobody"], ["y"])]))
    with pytest.raises(FormatError, match="nobody"):
        Session(path)


def test_a_cycle_is_refused(tmp_path):
    nodes = [helper.make_node("Add", ["x", "b"], ["a"]), helper.make_node("Relu", ["a"], ["b"])]
    path = written(tmp_path, model([*nodes, helper.make_node("Relu", ["b"], ["y"])]))
    with pytest.raises(FormatError, match="not an ONNX file, or is damaged|which no node before it makes"):
        Session(path)


def test_a_subgraph_is_refused(tmp_path):
    branch = helper.make_graph([helper.make_node("Relu", ["x"], ["r"])], "b", [], [])
    node = helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch)
    with pytest.raises(FormatError, match="has a subgraph"):
        Session(written(tmp_path, model([node])))


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (
            helper.make_node("Relu", ["x"], ["y"], domain="com.example"),
            "operator 'Relu' is of domain 'com.example'; only operators of the ONNX standard",
        ),
        (helper.make_node("Constant", [], ["y"]), "constant 'y' has 0 values, expected 1"),
    ],
)
def test_nodes_outside_the_standard_are_refused(tmp_path, node, message):
    content = model([node])
    content.opset_import.append(helper.make_opsetid("com.example", 1))
    with pytest.raises(FormatError, match=message):
        Session(written(tmp_path, content))


def test_a_type_that_onnx_does_not_define_is_refused(tmp_path):
    content = model([helper.make_node("Relu", ["x"], ["y"])])
    content.graph.input[0].type.tensor_type.elem_type = 999
    with pytest.raises(FormatError, match="type 999, which ONNX does not define"):
        Session(written(tmp_path, content))


def test_missing_files_and_text_are_refused(tmp_path):
    with pytest.raises(FileError, match="does not exist"):
        Session(tmp_path / "none.onnx")
    path = tmp_path / "text.onnx"
    path.write_text("not a model")
    with pytest.raises(FormatError):
        Session(path)


def weighted(kind, code=TensorProto.FLOAT):
    """Builds a matrix product with a constant of some type."""
    nodes = [helper.make_node("Cast", ["w"], ["c"], to=code), helper.make_node("MatMul", ["x", "c"], ["y"])]
    content = model(nodes, shape=("n", 3, 4, 4), kind=code)
    content.graph.initializer.append(helper.make_tensor("w", kind, [4, 4], np.ones(16)))
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (weighted(TensorProto.BFLOAT16), "weight 'w' is of type bfloat16; the runtimes take float16, float32, float64"),
        (weighted(TensorProto.UINT32), "constant 'w' is of type 'uint32', not one of bool, int32"),
        (model([helper.make_node("Identity", ["x"], ["y"])], kind=TensorProto.STRING), "'x' is of type 'object'"),
        (model([helper.make_node("Relu", ["x"], ["y"])], shape=("n", -3, 6, 6)), "'x' has a negative size"),
    ],
)
def test_types_and_sizes_that_no_archive_has_are_refused(tmp_path, content, message):
    path = written(tmp_path, content)
    with pytest.raises(FormatError, match=message) as caught:
        Session(path)
    assert repr(str(path)) in str(caught.value)


def test_an_output_that_is_no_tensor_is_refused(tmp_path):
    content = model([helper.make_node("SequenceConstruct", ["x"], ["y"])])
    content.graph.output[0].CopyFrom(helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, None))
    with pytest.raises(FormatError, match="value 'y' is no tensor"):
        Session(written(tmp_path, content))


_WITHOUT = """
import sys
sys.modules[sys.argv[2]] = None
from dsr_tool.errors import DsrError
from dsr_tool.runtime import Session
try:
    Session(sys.argv[1])
except DsrError as error:
    print(error.exit_code, error)
"""


@pytest.mark.parametrize("absent", ["onnx", "google.protobuf"])
def test_without_onnx_one_sentence_says_what_to_do(tmp_path, absent):
    path = written(tmp_path, model([helper.make_node("Relu", ["x"], ["y"])]))
    # In a process of its own, since some packages cannot be imported twice.
    child = subprocess.run(
        [sys.executable, "-c", _WITHOUT, str(path), absent], capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.startswith(f"1 {str(path)!r} is an ONNX file, and reading it takes the package onnx (")
    assert "(pip install onnx)" in child.stdout and child.stdout.endswith("-o model.dsr).\n")
    assert child.stdout.count("\n") == 1


_CHILD = """
import sys
import numpy
from dsr_tool.runtime import Session
Session(sys.argv[1]).run(numpy.ones((1, 3, 6, 6), numpy.float32))
print(*sorted({"torch", "torchvision", "onnxscript"} & set(sys.modules)))
"""


def test_a_session_of_an_onnx_file_imports_no_torch(tmp_path):
    weight = np.where(np.random.default_rng(0).random((8, 3, 3, 3)) < 0.2, 1, 0).astype(np.float32)
    path = written(tmp_path, model([helper.make_node("Conv", ["x", "w"], ["y"])], [("w", weight)]))
    child = subprocess.run([sys.executable, "-c", _CHILD, str(path)], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    assert child.stdout.strip() == ""
