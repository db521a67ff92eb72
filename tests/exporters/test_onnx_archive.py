"""ONNX files as archives: the same weights, the same outputs, and one sentence where that cannot be."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from dsr_tool.errors import FileError, FormatError, UsageError
from dsr_tool.runtime import Session
from exporters.onnx.archive import archive_of_onnx
from exporters.onnx.model import ONNX_ENCODINGS, to_onnx
from exporters.onnx.session import OnnxSession

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
    from converters.convert import convert
    from dsr_tool.sparse.trace import trace

    network = convert("squeezenet1_1", sparsity=0.9, num_classes=4, input_size=32)
    return network, trace(network.module, network.config.input_shape)


@pytest.mark.parametrize("encoding", ONNX_ENCODINGS)
@pytest.mark.parametrize("values", ["fp32", "fp16"])
def test_every_encoding_of_ours_comes_back(tmp_path, traced, encoding, values):
    network, graph = traced
    content = to_onnx(graph, network.tensors(), encoding=encoding, values=values, specs=network.specs)
    path = written(tmp_path, content)
    archive = archive_of_onnx(path, tmp_path / "model.dsr")
    x = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    expected = OnnxSession(path, threads=1).run(x)
    np.testing.assert_allclose(Session(archive, runtime="scipy").run(x), expected, atol=1e-5 * np.abs(expected).max())
    # The positions of compact weights are not carried along as constants.
    assert sum(array.nbytes for array in archive.graph.constants.values()) < 10_000
    assert archive.config.num_classes == 4
    assert archive.config.input_shape == (3, 32, 32)


def test_a_file_of_another_tool(tmp_path):
    weight = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)
    path = written(tmp_path, model([helper.make_node("Conv", ["x", "w"], ["y"])], [("w", weight)]))
    archive = archive_of_onnx(path, tmp_path / "model.dsr")
    x = np.ones((1, 3, 6, 6), np.float32)
    np.testing.assert_allclose(Session(archive).run(x), OnnxSession(path).run(x), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(archive.tensor("w").to_dense(), weight)


def test_two_inputs(tmp_path):
    path = written(tmp_path, model([helper.make_node("Add", ["x", "z"], ["y"])], inputs=("x", "z")))
    with pytest.raises(UsageError, match="takes 2 inputs"):
        archive_of_onnx(path, tmp_path / "model.dsr")


def test_a_name_that_nothing_makes(tmp_path):
    path = written(tmp_path, model([helper.make_node("Relu", ["nobody"], ["y"])]))
    with pytest.raises(FormatError, match="nobody"):
        archive_of_onnx(path, tmp_path / "model.dsr")


def test_a_cycle(tmp_path):
    nodes = [helper.make_node("Add", ["x", "b"], ["a"]), helper.make_node("Relu", ["a"], ["b"])]
    path = written(tmp_path, model([*nodes, helper.make_node("Relu", ["b"], ["y"])]))
    with pytest.raises(FormatError, match="not an ONNX file, or is damaged|which nothing makes before it"):
        archive_of_onnx(path, tmp_path / "model.dsr")


def test_a_subgraph(tmp_path):
    branch = helper.make_graph([helper.make_node("Relu", ["x"], ["r"])], "b", [], [])
    node = helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch)
    with pytest.raises(FormatError, match="neither a number, a string nor a list"):
        archive_of_onnx(written(tmp_path, model([node])), tmp_path / "model.dsr")


def test_what_is_no_onnx_file(tmp_path):
    with pytest.raises(FileError, match="does not exist"):
        archive_of_onnx(tmp_path / "none.onnx", tmp_path / "model.dsr")
    path = tmp_path / "text.onnx"
    path.write_text("not a model")
    with pytest.raises(FormatError):
        archive_of_onnx(path, tmp_path / "model.dsr")
