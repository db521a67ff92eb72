"""Compact files become dense ones with the same bits under the same names, for the tools of runtimes."""

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from dsr_tool.errors import CheckFailed, FileError, FormatError
from exporters.export import densify_export, export
from exporters.onnx.densify import densify
from exporters.onnx.read import read_onnx
from exporters.onnx.session import OnnxSession
from exporters.onnx.write import to_onnx

pytestmark = pytest.mark.usefixtures("trace_once")
COMPACT = ("auto", "delta", "bitmask", "coo", "dense")


@pytest.mark.parametrize("encoding", COMPACT)
@pytest.mark.parametrize("values", ["fp32", "fp16"])
def test_densify_gives_plain_initializers(make_model, captured, encoding, values):
    model = make_model(0.9)
    tensors = model.tensors()
    dense = densify(to_onnx(captured, tensors, encoding=encoding, values=values, specs=model.specs))
    plain = to_onnx(captured, tensors, encoding="dense")
    onnx.checker.check_model(dense, full_check=True)
    assert [node.op_type for node in dense.graph.node] == [node.op_type for node in plain.graph.node]
    arrays = {t.name: numpy_helper.to_array(t) for t in dense.graph.initializer}
    for tensor in plain.graph.initializer:
        expected = numpy_helper.to_array(tensor)
        if values == "fp16" and tensor.name in model.specs and model.specs[tensor.name].weight:
            expected = expected.astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(arrays.pop(tensor.name), expected)
    assert not arrays and not dense.graph.sparse_initializer


def test_dense_files_are_verified_and_can_be_quantized(make_model, tmp_path):
    export(make_model(), tmp_path / "compact.onnx", values="fp16")
    verification = densify_export(tmp_path / "compact.onnx", tmp_path / "dense.onnx")
    assert verification.passed and verification.weights_equal and verification.path == tmp_path / "dense.onnx"
    assert verification.file_bytes == (tmp_path / "dense.onnx").stat().st_size
    compact, dense = (read_onnx(tmp_path / name) for name in ("compact.onnx", "dense.onnx"))
    assert set(dense.entries) == set(compact.entries)
    assert {entry.codec for entry in dense.entries.values()} == {"dense"}
    assert dense.architecture == "Small"

    types = {"weight_type": QuantType.QUInt8}
    quantize_dynamic(
        tmp_path / "dense.onnx", tmp_path / "quantized.onnx", op_types_to_quantize=["MatMul", "Gemm"], **types
    )
    quantized = onnx.load(tmp_path / "quantized.onnx")
    assert "MatMulInteger" in {node.op_type for node in quantized.graph.node}
    x = np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype(np.float32)
    exact, rough = (OnnxSession(tmp_path / name).run(x) for name in ("dense.onnx", "quantized.onnx"))
    assert np.abs(exact - rough).max() < 0.1 * np.abs(exact).max()


def with_output(path, second):
    """Writes a file with a matrix product `y` as its first output, and a node of it as the second."""
    weight = numpy_helper.from_array(np.eye(3, 4, dtype=np.float32), "w")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node(*second[:1], ["y"], ["z"], **second[1])]
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", n]) for name, n in (("x", 3), ("y", 4)))
    z = helper.make_tensor_value_info("z", second[2], ["n", None])
    graph = helper.make_graph(nodes, "g", [x], [y, z], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)


def test_outputs_of_every_type_of_numbers_are_compared(tmp_path):
    for second in (
        ("IsNaN", {}, onnx.TensorProto.BOOL),
        ("Cast", {"to": onnx.TensorProto.UINT8}, onnx.TensorProto.UINT8),
    ):
        with_output(tmp_path / "a.onnx", second)
        assert densify_export(tmp_path / "a.onnx", tmp_path / "b.onnx", force=True).passed
    with_output(tmp_path / "a.onnx", ("Cast", {"to": onnx.TensorProto.STRING}, onnx.TensorProto.STRING))
    with pytest.raises(FormatError, match="output 'z' is no tensor of real numbers"):
        densify_export(tmp_path / "a.onnx", tmp_path / "c.onnx")
    assert not (tmp_path / "c.onnx").exists()


def test_a_small_output_is_not_hidden_by_a_large_one(tmp_path, monkeypatch):
    with_output(tmp_path / "a.onnx", ("Sigmoid", {}, onnx.TensorProto.FLOAT))
    run_all, runs = OnnxSession.run_all, []

    def altered(session, x):
        runs.append(1)
        outputs = run_all(session, x)
        return {"y": outputs["y"] * 1e6, "z": outputs["z"] + (1e-3 if len(runs) > 2 else 0)}  # of the second file

    monkeypatch.setattr(OnnxSession, "run_all", altered)
    with pytest.raises(CheckFailed, match="its output 'z' differs from that of .* by 0.001"):
        densify_export(tmp_path / "a.onnx", tmp_path / "b.onnx")


def test_files_that_cannot_be_made_dense_are_refused(make_model, tmp_path, monkeypatch):
    with pytest.raises(FileError, match="does not exist"):
        densify_export(tmp_path / "none.onnx", tmp_path / "dense.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(FormatError):
        densify_export(tmp_path / "text.onnx", tmp_path / "dense.onnx")
    export(make_model(), tmp_path / "m.onnx")
    with pytest.raises(FileError, match="exists already"):
        densify_export(tmp_path / "m.onnx", tmp_path / "m.onnx")
    monkeypatch.setattr("exporters.verify.compare.RELATIVE_TOLERANCE", -1.0)
    with pytest.raises(CheckFailed, match="its output '.*' differs from that of"):
        densify_export(tmp_path / "m.onnx", tmp_path / "dense.onnx")
    assert not (tmp_path / "dense.onnx").exists()
