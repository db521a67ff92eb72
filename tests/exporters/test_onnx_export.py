"""ONNX files of whole models: outputs, sizes, decoding, and what the reader finds in files of any tool."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torchvision import models

from dsr_tool.errors import FileError, FormatError, UsageError
from dsr_tool.formats.archive import open_archive
from dsr_tool.sparse.sparsify import sparsify
from dsr_tool.sparsity.budget import Budget
from dsr_tool.sparsity.config import ModelConfig
from exporters.export import export
from exporters.onnx.read import read_onnx
from exporters.onnx.write import to_onnx

pytestmark = pytest.mark.usefixtures("trace_once")
COUNT = 864 + 1536 + 12288 + 640  # weights of the sparse layers; the depthwise one stays dense


def outputs(model, x, optimized=None):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if optimized:
        options.optimized_model_filepath = str(optimized)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"input": x})[0]


@pytest.mark.parametrize("encoding", ["auto", "dense", "delta", "bitmask", "coo"])
@pytest.mark.parametrize("sparsity", [1 - 4 / COUNT, 0.9, 0.5, 0.0])
def test_outputs_are_those_of_pytorch_at_every_density(make_model, captured, sparsity, encoding, tmp_path):
    model = make_model(sparsity)
    proto = to_onnx(captured, model.tensors(), encoding=encoding)
    # Strict shape inference takes a sparse initializer for another type than its weight.
    onnx.checker.check_model(proto, full_check=encoding != "coo")
    model.module.eval()
    for batch in (1, 2, 3):
        x = np.random.default_rng(batch).standard_normal((batch, 3, 16, 16)).astype(np.float32)
        with torch.no_grad():
            expected = model(torch.from_numpy(x)).numpy()
        found = outputs(proto, x, tmp_path / "optimized.onnx")
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    left = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert not left & {"Cast", "CumSum", "Expand", "Gather", "Mul", "ScatterElements", "BatchNormalization"}
    decoding = "CumSum" in {node.op_type for node in proto.graph.node}
    assert decoding == (sparsity > 0 and encoding not in ("dense", "coo"))
    assert len(proto.graph.sparse_initializer) == (4 if encoding == "coo" and sparsity > 0 else 0)


def test_auto_is_never_larger_and_shrinks_with_the_density(make_model, captured):
    def size(sparsity, encoding):
        return to_onnx(captured, make_model(sparsity).tensors(), encoding=encoding).ByteSize()

    others = ("bitmask", "coo", "delta", "dense")
    sizes = {(s, e): size(s, e) for s in (0.1, 0.9) for e in ("auto", *others)}
    assert sizes[0.9, "auto"] < 0.35 * sizes[0.9, "dense"]
    for sparsity in (0.1, 0.9):
        assert sizes[sparsity, "auto"] <= min(sizes[sparsity, other] for other in others)


def test_export_and_read_back(make_model, tmp_path):
    model = make_model(0.9)
    verification = export(model, tmp_path / "m.onnx", encoding="auto")
    assert verification.passed and verification.path == tmp_path / "m.onnx"
    assert verification.file_bytes == (tmp_path / "m.onnx").stat().st_size
    assert verification.masks_equal and verification.weights_equal and verification.notes == ()
    assert 0 <= verification.largest_difference <= verification.tolerance < 1e-4
    json.dumps(verification.to_dict())
    assert list(tmp_path.iterdir()) == [tmp_path / "m.onnx"]

    file = read_onnx(tmp_path / "m.onnx")
    assert file.architecture == "Small"
    for name, mask in model.masks.items():
        entry = file.entries[name]
        np.testing.assert_array_equal(file.tensor(name).mask.to_bool(), mask.numpy())
        assert entry.spec.role == "sparse" and entry.active == int(mask.sum())
        assert entry.spec.macs_per_weight == model.specs[name].macs_per_weight > 0
    assert file.entries["3.weight"].spec.role == "dense" and file.entries["3.weight"].spec.weight
    assert file.entries["3.bias"].spec.weight is False
    assert {entry.codec for entry in file.entries.values()} > {"dense"}
    total = file.document_bytes + sum(entry.nbytes for entry in file.entries.values())
    assert total == file.nbytes and file.document_bytes > 0


def test_the_same_model_gives_the_same_bytes(make_model, tmp_path):
    for name in ("one.onnx", "two.onnx"):
        export(make_model(), tmp_path / name)
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()


def test_an_archive_becomes_onnx_without_its_model(make_model, tmp_path):
    model = make_model()
    verification = export(model, tmp_path / "m.dsr")
    assert set(verification.runtimes) == {"sparse", "onnxruntime"} and verification.passed
    archive = open_archive(tmp_path / "m.dsr")
    x = np.ones((2, 3, 16, 16), np.float32)
    found = outputs(to_onnx(archive.graph, dict(archive)), x)
    with torch.no_grad():
        np.testing.assert_allclose(found, model.module.eval()(torch.from_numpy(x)), atol=1e-5)


def test_float16_files_are_smaller_and_note_the_effect_of_rounding(make_model, tmp_path):
    for encoding in ("auto", "delta", "bitmask", "coo", "dense"):
        sizes = {}
        for values in ("fp32", "fp16"):
            path = tmp_path / f"{encoding}-{values}.onnx"
            verification = export(make_model(), path, encoding=encoding, values=values)
            sizes[values] = verification.file_bytes
            assert verification.passed and verification.weights_equal
            assert bool(verification.notes) == (values == "fp16")
        assert sizes["fp16"] < 0.85 * sizes["fp32"]
        assert "rounded to float16" in verification.notes[0]
        assert verification.largest_difference <= verification.tolerance
        file = read_onnx(path)
        tensors = make_model().tensors()
        assert file.entries["8.weight"].dtype == "float16" and file.array("8.weight").dtype == np.float32
        assert np.array_equal(file.tensor("8.weight").values, tensors["8.weight"].values.astype(np.float16))
        assert file.entries["3.weight"].dtype == "float16" and file.entries["3.bias"].dtype == "float32"
        weights = {name for name, spec in make_model().specs.items() if spec.weight}
        assert {name for name, entry in file.entries.items() if entry.spec.weight} == weights


def test_a_weight_that_overflows_float16_is_named(make_model, tmp_path):
    model = make_model()
    with torch.no_grad():
        model.weights["8.weight"][model.masks["8.weight"]] = 1e5
    with pytest.raises(UsageError, match="'8.weight'"):
        export(model, tmp_path / "m.onnx", values="fp16")
    assert not list(tmp_path.iterdir())


def test_compacted_files_compute_the_same(make_model, tmp_path):
    model = make_model(0.9)
    with torch.no_grad():
        model.weights["8.weight"][:40] = 0
        model.masks["8.weight"][:40] = False
    plain = export(model, tmp_path / "plain.onnx")
    small = export(model, tmp_path / "small.onnx", compact=True)
    assert small.passed and small.file_bytes < plain.file_bytes
    file = read_onnx(tmp_path / "small.onnx")
    assert file.record["compacted"]["plain_bytes"] == plain.file_bytes
    (left, _), (_, read) = (file.entries[name].spec.shape for name in ("8.weight", "10.weight"))
    assert left == read <= 24


def test_multiply_adds_of_resnet18_are_those_of_its_modules():
    model = sparsify(
        models.resnet18(num_classes=10), ModelConfig("torchvision", "resnet18", 10, (3, 64, 64)), Budget(sparsity=0.5)
    )
    from dsr_tool.sparse.trace import trace
    from exporters.onnx.macs import weight_uses

    proto = to_onnx(trace(model.module, (3, 64, 64)), model.tensors(), encoding="dense")
    declared = {
        spec.name: helper.make_tensor_value_info(spec.name, TensorProto.FLOAT, spec.shape)
        for spec in model.specs.values()
    }
    uses = weight_uses(proto, declared)
    expected = {name: spec.macs_per_weight for name, spec in model.specs.items() if spec.weight}
    assert {name: use.macs_per_weight for name, use in uses.items()} == expected


def foreign(path, nodes, initializers, shape=("n", 6), sparse=()):
    values = [helper.make_tensor_value_info(name, 1, dims) for name, dims in (("x", shape), ("y", (*shape[:-1], 4)))]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], initializers, sparse_initializer=sparse)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return read_onnx(path)


def test_files_of_other_tools_are_read(tmp_path):
    weight, square = np.eye(6, 4, dtype=np.float32), np.eye(4, dtype=np.float32)
    constant = helper.make_node("Constant", [], ["v"], value=numpy_helper.from_array(square, "v"))
    file = foreign(
        tmp_path / "m.onnx",
        [
            helper.make_node("MatMul", ["x", "w"], ["a"]),
            constant,
            helper.make_node("Add", ["a", "b"], ["c"]),
            helper.make_node("Transpose", ["v"], ["t"]),
            helper.make_node("MatMul", ["c", "t"], ["y"]),
        ],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.ones(4, np.float32), "b")],
        shape=("n", 5, 6),
    )
    assert file.architecture == ""
    assert (file.entries["w"].active, file.entries["w"].spec.role, file.entries["w"].spec.macs_per_weight) == (
        4,
        "sparse",
        5,
    )
    assert file.entries["b"].spec.role == "dense" and file.entries["b"].active == 4
    assert file.entries["v"].spec.kind == "MatMul" and file.entries["v"].active == 4


def test_sparse_initializers_are_read(tmp_path):
    def sparse(positions):
        values = numpy_helper.from_array(np.array([1.0, 2.0], np.float32), "w")
        indices = helper.make_tensor("w_indices", TensorProto.INT64, [2], positions)
        return [helper.make_sparse_tensor(values, indices, [6, 4])]

    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    file = foreign(tmp_path / "m.onnx", nodes, [], sparse=sparse([3, 20]))
    assert file.tensor("w").mask.positions.tolist() == [3, 20] and file.entries["w"].codec == "coo"
    with pytest.raises(FormatError):
        foreign(tmp_path / "m.onnx", nodes, [], sparse=sparse([3, 24]))


def test_files_that_are_no_onnx_are_refused(tmp_path, make_model, captured):
    with pytest.raises(FileError, match="does not exist"):
        read_onnx(tmp_path / "none.onnx")
    content = to_onnx(captured, make_model().tensors()).SerializeToString()
    for name, data in (("empty", b""), ("text", b"no model at all\n"), ("cut", content[: len(content) // 2])):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(FormatError, match=f"{name}' is not an ONNX file, or is damaged"):
            read_onnx(tmp_path / name)


def test_unknown_options_a_missing_shape_and_too_large_models_are_refused(make_model, tmp_path, monkeypatch, captured):
    with pytest.raises(UsageError, match="csr"):
        export(make_model(), tmp_path / "m.onnx", encoding="csr")
    with pytest.raises(UsageError, match="delta"):
        to_onnx(captured, make_model().tensors(), encoding="delt")
    with pytest.raises(UsageError, match="zip"):
        export(make_model(), tmp_path / "m.dsr", encoding="zip")
    for to in ("onnx", "archive"):
        with pytest.raises(UsageError, match="input shape"):
            export(make_model(input_shape=()), tmp_path / "m", to=to)
    monkeypatch.setattr("exporters.onnx.write._MAX_BYTES", 1000)
    with pytest.raises(UsageError, match="allows in one file"):
        export(make_model(), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
    (tmp_path / "there").write_text("mine")
    for to in ("onnx", "archive"):
        with pytest.raises(FileError, match="exists already"):
            export(make_model(), tmp_path / "there", to=to)
    assert (tmp_path / "there").read_text() == "mine"
