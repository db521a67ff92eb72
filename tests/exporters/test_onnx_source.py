"""ONNX files of any tool become archives and compact ONNX files, with their zeros as masks."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dsr_tool.errors import CheckFailed, FileError, FormatError, UsageError
from dsr_tool.formats.archive import open_archive
from dsr_tool.runtime import Session
from exporters.containers import contents_of
from exporters.export import export_onnx, verify_onnx_export
from exporters.onnx.session import OnnxSession

RNG = np.random.default_rng(0)


def pruned(*shape: int, density: float = 0.1) -> np.ndarray:
    return np.where(RNG.random(shape) < density, RNG.standard_normal(shape), 0).astype(np.float32)


ARRAYS = {
    "w1": RNG.standard_normal((16, 3, 3, 3)).astype(np.float32),
    "w2": pruned(32, 16, 3, 3),
    "b2": np.array([0, 1] * 16, np.float32),
    "w3": pruned(200, 32),
}
"""Weights of a network that was pruned elsewhere; half of a bias is zero as well."""


def network(opset=13, shape=("n", 3, "h", "w"), arrays=None, kind=TensorProto.FLOAT, nodes=()) -> onnx.ModelProto:
    arrays = {**ARRAYS, **(arrays or {})}
    nodes = [
        *nodes,
        helper.make_node("Conv", ["f" if nodes else "x", "w1"], ["c1"], pads=[1] * 4, strides=[2, 2]),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], pads=[1] * 4),
        helper.make_node("HardSwish" if opset > 13 else "Sigmoid", ["c2"], ["r2"]),
        helper.make_node("GlobalAveragePool", ["r2"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f1"]),
        helper.make_node("Gemm", ["f1", "w3"], ["y"], transB=1),
    ]
    values = [
        helper.make_tensor_value_info("x", kind, shape),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, [shape[0], 200]),
    ]
    initializers = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "source.onnx"
    path.write_bytes(network().SerializeToString())
    return path


def test_zeros_become_masks_and_the_archive_is_small(tmp_path, source):
    done = export_onnx(source, tmp_path / "a.dsr")
    assert done.passed and done.kind == "archive" and set(done.runtimes) == {"onnxruntime", "sparse"}
    archive = open_archive(tmp_path / "a.dsr")
    for name, array in ARRAYS.items():
        tensor = archive.tensor(name)
        np.testing.assert_array_equal(tensor.to_dense(), array)
        sparse = name.startswith("w")
        assert tensor.mask.active == (np.count_nonzero(array) if sparse else array.size)
        assert (archive.entries[name].spec.role == "sparse") is sparse
    assert (tmp_path / "a.dsr").stat().st_size < 0.5 * source.stat().st_size


def test_any_size_and_any_batch_stay_free(tmp_path, source):
    export_onnx(source, tmp_path / "a.dsr")
    session = Session(tmp_path / "a.dsr")
    assert session.input.shape == (None, 3, None, None)
    for shape in ((1, 3, 20, 30), (3, 3, 17, 9)):
        x = RNG.standard_normal(shape).astype(np.float32)
        np.testing.assert_allclose(session.run(x), OnnxSession(source).run(x), rtol=1e-5, atol=1e-5)


def test_an_input_shape_is_fixed_and_counts_work(tmp_path, source):
    done = export_onnx(source, tmp_path / "a.dsr", input_shape=(3, 24, 32))
    assert any("1x3x24x32" in note for note in done.notes)
    archive = open_archive(tmp_path / "a.dsr")
    assert archive.graph.inputs[0].shape == (None, 3, 24, 32) and archive.config.input_shape == (3, 24, 32)
    assert archive.entries["w2"].spec.macs_per_weight == 12 * 16
    assert verify_onnx_export(tmp_path / "a.dsr", source).passed
    for shape in ((3, 24), (4, 24, 32), (3, 0, 32), (3, 1 << 21, 32)):
        with pytest.raises(UsageError, match="--input-shape"):
            export_onnx(source, tmp_path / "b.dsr", input_shape=shape)


@pytest.mark.parametrize("to", ["a.dsr", "a.onnx"])
@pytest.mark.parametrize("values", ["fp32", "fp16", "int8", "int5"])
@pytest.mark.parametrize("compact", [False, True])
def test_every_type_of_values_is_written_and_verified_again(tmp_path, source, to, values, compact):
    done = export_onnx(source, tmp_path / to, values=values, compact=compact)
    assert done.passed and (done.rounding_largest is None) is (values == "fp32")
    again = verify_onnx_export(tmp_path / to, source)
    assert again.passed and again.masks_equal and again.weights_equal
    contents = contents_of(tmp_path / to)[1]
    assert (contents.saved is not None) is compact


@pytest.mark.parametrize("encoding", ["auto", "delta", "bitmask", "coo", "dense"])
def test_compact_onnx_files_are_written_in_every_encoding(tmp_path, source, encoding):
    assert export_onnx(source, tmp_path / "a.onnx", encoding=encoding).passed
    smaller = (tmp_path / "a.onnx").stat().st_size < source.stat().st_size
    assert smaller is (encoding != "dense")
    # ... and are a source themselves.
    assert export_onnx(tmp_path / "a.onnx", tmp_path / "b.dsr").passed


@pytest.mark.parametrize("values", ["fp16", "int8"])
def test_rounded_onnx_files_become_archives_of_the_same_values(tmp_path, source, values):
    export_onnx(source, tmp_path / "a.onnx", values=values)
    done = export_onnx(tmp_path / "a.onnx", tmp_path / "b.dsr")
    assert done.passed and done.rounding_largest is None
    assert done.file_bytes < 1.1 * export_onnx(source, tmp_path / "c.dsr", values=values).file_bytes


def test_a_file_of_other_weights_does_not_pass(tmp_path, source):
    export_onnx(source, tmp_path / "a.dsr")
    other = {name: array.copy() for name, array in ARRAYS.items()}
    place = tuple(np.argwhere(other["w2"])[0])
    other["w2"][place] *= 1 + 1e-6
    (tmp_path / "other.onnx").write_bytes(network(arrays=other).SerializeToString())
    found = verify_onnx_export(tmp_path / "a.dsr", tmp_path / "other.onnx")
    assert not found.passed and found.masks_equal and not found.weights_equal
    other["w2"][place] = 0
    (tmp_path / "other.onnx").write_bytes(network(arrays=other).SerializeToString())
    assert not verify_onnx_export(tmp_path / "a.dsr", tmp_path / "other.onnx").masks_equal


def test_a_wrong_computation_does_not_pass_and_leaves_no_file(tmp_path, source, monkeypatch):
    monkeypatch.setattr("dsr_tool.runtime.session.Session.run_all", lambda self, x: {"y": np.zeros((len(x), 200))})
    with pytest.raises(CheckFailed, match="sparse differs from the ONNX file"):
        export_onnx(source, tmp_path / "a.dsr")
    assert [path.name for path in tmp_path.iterdir()] == ["source.onnx"]


@pytest.mark.parametrize("fault", [1.01, 1.0001])
def test_a_fault_of_the_reference_does_not_pass_for_rounding(tmp_path, source, monkeypatch, fault):
    """The run in double precision is by the same code, and would agree with its faults."""
    from dsr_tool.runtime.reference import call

    monkeypatch.setitem(
        call.FUNCTIONS, "GlobalAveragePool", lambda x: x.mean(axis=(2, 3), keepdims=True) * np.float32(fault)
    )
    monkeypatch.setattr("dsr_tool.runtime.kernels.library.library", lambda: None)
    monkeypatch.setattr("dsr_tool.runtime.session.library", lambda: None)
    with pytest.raises(CheckFailed, match="sparse differs from the ONNX file"):
        export_onnx(source, tmp_path / "a.dsr")


def test_bytes_of_pictures_are_an_input(tmp_path):
    cast = [helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT)]
    path = tmp_path / "bytes.onnx"
    path.write_bytes(network(kind=TensorProto.UINT8, nodes=cast).SerializeToString())
    for name in ("a.dsr", "a.onnx"):
        assert export_onnx(path, tmp_path / name).passed


def test_a_model_of_one_line_height_is_run_on_it(tmp_path):
    """Readers of text take lines of one height: a square of another size fails inside."""
    content = network()
    content.graph.node.insert(0, helper.make_node("Reshape", ["x", "sizes"], ["x2"]))
    content.graph.node[1].input[0] = "x2"
    content.graph.initializer.append(numpy_helper.from_array(np.array([0, 3, 48, -1], np.int64), "sizes"))
    content.graph.node.insert(0, helper.make_node("Slice", ["x", "a", "b", "c"], ["x0"]))
    for name, value in (("a", 47), ("b", 48), ("c", 2)):
        content.graph.initializer.append(numpy_helper.from_array(np.array([value], np.int64), name))
    content.graph.node.insert(2, helper.make_node("Sub", ["x2", "x0"], ["x3"]))
    content.graph.node[3].input[0] = "x3"
    path = tmp_path / "line.onnx"
    path.write_bytes(content.SerializeToString())
    done = export_onnx(path, tmp_path / "a.dsr")
    assert any("on inputs of 1x3x48x48" in note for note in done.notes)


def test_a_model_that_runs_on_nothing_asks_for_a_shape(tmp_path, monkeypatch, source):
    def fail(*_):
        raise FormatError("no such size.")

    monkeypatch.setattr("exporters.onnx.session.OnnxSession.run_all", fail)
    with pytest.raises(FormatError, match="runs on none that was tried.*--input-shape"):
        export_onnx(source, tmp_path / "a.dsr")


def test_a_fixed_batch_stays(tmp_path):
    path = tmp_path / "one.onnx"
    path.write_bytes(network(shape=(2, 3, 16, 16)).SerializeToString())
    assert any("of 2x3x16x16" in note for note in export_onnx(path, tmp_path / "a.dsr").notes)


def test_an_existing_file_is_kept(tmp_path, source):
    (tmp_path / "a.dsr").write_text("mine")
    with pytest.raises(FileError):
        export_onnx(source, tmp_path / "a.dsr")
    assert (tmp_path / "a.dsr").read_text() == "mine"
    assert export_onnx(source, tmp_path / "a.dsr", force=True).passed


def test_the_same_file_gives_the_same_bytes(tmp_path, source):
    for name in ("a.dsr", "b.dsr", "a.onnx", "b.onnx"):
        export_onnx(source, tmp_path / name)
    for ending in ("dsr", "onnx"):
        assert (tmp_path / f"a.{ending}").read_bytes() == (tmp_path / f"b.{ending}").read_bytes()


def test_several_inputs_are_refused(tmp_path):
    content = network()
    content.graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", 200]))
    content.graph.node[-1].input.append("z")
    (tmp_path / "two.onnx").write_bytes(content.SerializeToString())
    with pytest.raises(UsageError, match="takes 2 inputs"):
        export_onnx(tmp_path / "two.onnx", tmp_path / "a.dsr")
