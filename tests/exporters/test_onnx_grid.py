"""Weights on a grid in ONNX files: every runtime restores them, verification tells them, hostile parts are refused."""

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from dsr_tool.errors import FormatError, UsageError
from dsr_tool.runtime import Session
from dsr_tool.sparsity.grid import GridTensor, row_counts
from dsr_tool.sparsity.mask import Mask
from exporters.export import densify_export, export, verify
from exporters.onnx.decode import decode, find
from exporters.onnx.read import read_onnx, stored_weights
from tests.exporters.test_onnx_forms import EVALUATOR_IS_RIGHT, by_openvino, computed, model_of, parts_of

GRIDS = ("int8", "int6", "int5", "int4")


def grid_of(shape, density, seed=0):
    random = np.random.default_rng(seed)
    mask = Mask.from_bool(np.asarray(random.random(shape) < density))
    rows = len(row_counts(mask))
    codes = random.integers(1, 128, mask.active).astype(np.int8) * random.choice([-1, 1], mask.active).astype(np.int8)
    return GridTensor(mask, codes, random.uniform(0.1, 2, rows).astype(np.float32))


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([(3,), (1, 8), (8, 5, 3, 3), (64, 40), (7, 11)]),
    st.sampled_from([0.0, 0.05, 0.3, 0.9, 1.0]),
    st.sampled_from(["auto", "delta", "bitmask", "dense"]),
    st.integers(0, 99),
)
def test_evaluator_runtime_and_reader_restore_the_weight(shape, density, encoding, seed):
    tensor = grid_of(shape, density, seed)
    model = model_of(tensor, encoding=encoding)
    onnx.checker.check_model(model, full_check=True)
    expected = tensor.to_dense()
    if EVALUATOR_IS_RIGHT:
        assert np.array_equal(ReferenceEvaluator(model).run(None, {"x": np.zeros(1, np.float32)})[0], expected)
    assert np.array_equal(computed(model)[0], expected)
    (stored,) = stored_weights(model.graph)
    read = stored.read()
    assert isinstance(read, GridTensor) and read.mask.equals(tensor.mask)
    assert np.array_equal(read.codes, tensor.codes) and np.array_equal(read.scales, tensor.scales)


def test_openvino_restores_the_weights(tmp_path):
    pytest.importorskip("openvino")
    tensors = [grid_of(*case) for case in (((8, 5, 3, 3), 0.5), ((64, 40), 0.1), ((7, 11), 1.0), ((300, 301), 0.01))]
    models = [model_of(*tensors, encoding=encoding) for encoding in ("delta", "bitmask", "dense")]
    for results in by_openvino(tmp_path, models):
        for result, tensor in zip(results, tensors, strict=True):
            assert np.array_equal(result, tensor.to_dense())


@pytest.mark.parametrize("values", GRIDS)
def test_files_hold_the_rounded_model_and_run_in_every_runtime(make_model, tmp_path, values):
    model = make_model()
    path, archive = tmp_path / "m.onnx", tmp_path / "m.dsr"
    found = export(model, path, values=values)
    assert found.passed and found.weights_equal and "rounded to few bits" in found.notes[0]
    export(model, archive, values=values)
    assert {entry.dtype for entry in read_onnx(path).entries.values() if entry.spec.weight} == {"int8"}
    x = np.random.default_rng(1).standard_normal((2, *model.config.input_shape)).astype(np.float32)
    expected = Session(archive, runtime="scipy").run(x)
    for runtime in ("native", "scipy"):
        np.testing.assert_allclose(Session(path, runtime=runtime).run(x), expected, atol=1e-5 * np.abs(expected).max())
    assert verify(path, make_model()).passed


def test_a_file_of_another_model_does_not_pass(make_model, tmp_path):
    export(make_model(), tmp_path / "m.onnx", values="int8")
    export(make_model(), tmp_path / "m.dsr", values="int8")
    other = make_model()
    weight = other.weights["8.weight"]
    weight.data[other.masks["8.weight"]] *= 1.05
    for name in ("m.onnx", "m.dsr"):
        found = verify(tmp_path / name, other)
        assert not found.passed and not found.weights_equal


@pytest.mark.parametrize("values", ["int8", "int4"])
def test_compacted_files_hold_the_rounded_model(make_model, tmp_path, values):
    model = make_model(0.97)
    assert export(model, tmp_path / "m.onnx", values=values, compact=True).passed
    assert verify(tmp_path / "m.onnx", make_model(0.97)).passed


def test_few_bits_are_smaller_and_can_be_made_dense(make_model, tmp_path):
    sizes = {}
    for values in ("fp32", "fp16", "int8"):
        export(make_model(0.5), tmp_path / f"{values}.onnx", values=values)
        sizes[values] = (tmp_path / f"{values}.onnx").stat().st_size
    assert sizes["int8"] < 0.75 * sizes["fp16"] < 0.75 * sizes["fp32"]
    dense = tmp_path / "dense.onnx"
    assert densify_export(tmp_path / "int8.onnx", dense).passed
    assert {tensor.data_type for tensor in onnx.load(dense).graph.initializer} <= {TensorProto.FLOAT, TensorProto.INT64}


def test_coo_holds_no_codes(make_model, tmp_path):
    with pytest.raises(UsageError, match="'coo' holds floats, not weights in few bits; use --encoding auto"):
        export(make_model(), tmp_path / "m.onnx", values="int8", encoding="coo")
    assert not list(tmp_path.iterdir())


BAD_SCALES = [np.nan, np.inf, -1.0, 1e-40, 3e38, 0.0, -0.0]


@pytest.mark.parametrize("encoding", ["delta", "bitmask", "dense"])
@pytest.mark.parametrize("scale", BAD_SCALES)
def test_scales_that_no_writer_makes_are_refused(encoding, scale):
    model = model_of(grid_of((4, 8), 0.5), encoding=encoding)
    nodes, arrays = parts_of(model)
    found = find("w0", nodes, arrays)
    scales = np.ones((4, 1), np.float32)
    scales[2] = scale
    arrays[found.leaves["scale"]] = numpy_helper.from_array(scales, "scale")
    with pytest.raises(FormatError, match="weight 'w0'"):
        decode(found, arrays)


@pytest.mark.parametrize("encoding", ["delta", "bitmask", "dense"])
@pytest.mark.parametrize(
    ("leaf", "array"),
    [
        ("scale", np.ones((3, 1), np.float32)),
        ("scale", np.ones(4, np.float32)),
        ("values", np.full((4, 8), -128, np.int8)),
    ],
)
def test_parts_that_do_not_fit_are_refused(encoding, leaf, array):
    model = model_of(grid_of((4, 8), 1.0), encoding="dense") if encoding == "dense" else None
    model = model or model_of(grid_of((4, 8), 0.5), encoding=encoding)
    nodes, arrays = parts_of(model)
    found = find("w0", nodes, arrays)
    if leaf == "values" and encoding != "dense":
        count = arrays[found.leaves["values"]].dims[0]
        array = np.array([0, *[-128] * (count - 1)], np.int8)
    arrays[found.leaves[leaf]] = numpy_helper.from_array(array, leaf)
    with pytest.raises(FormatError, match="weight 'w0'"):
        decode(found, arrays)


def test_products_of_other_tools_are_not_mistaken():
    # A cast table of bytes times a number that is no scale of rows, and one times a row.
    for scale in (np.ones((1, 4), np.float32), np.ones((2, 4), np.float32)):
        nodes = [
            helper.make_node("Cast", ["t"], ["f"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["f", "s"], ["w"]),
        ]
        arrays = {"t": numpy_helper.from_array(np.ones((2, 4), np.int8), "t"), "s": numpy_helper.from_array(scale, "s")}
        assert find("w", {node.output[0]: node for node in nodes}, arrays) is None
