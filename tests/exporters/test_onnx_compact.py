"""Byte distances: what ONNX's own reference evaluator and ONNX Runtime make of them."""

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from dsr_tool.core.codecs import SparseTensor
from dsr_tool.core.mask import Mask
from dsr_tool.errors import FormatError
from exporters.onnx_compact import compact_nodes, compact_parts, decode, nonzero


def tensor_of(shape, positions, dtype=np.float32):
    positions = np.array(sorted(positions), np.int64)
    return SparseTensor(Mask(shape, positions), np.arange(1, len(positions) + 1).astype(dtype))


def model_of(tensor, name="w"):
    nodes, initializers = compact_nodes(name, tensor)
    kind = helper.np_dtype_to_tensor_dtype(tensor.values.dtype)
    output = helper.make_tensor_value_info(name, kind, tensor.mask.shape)
    graph = helper.make_graph(nodes, "g", [], [output], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def parts_of(model):
    nodes = {node.output[0]: node for node in model.graph.node}
    return nodes, {tensor.name: tensor for tensor in model.graph.initializer}


@st.composite
def sparse_tensors(draw):
    shape = tuple(draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)))
    size = int(np.prod(shape))
    return tensor_of(shape, draw(st.sets(st.integers(0, size - 1), max_size=30)))


@settings(max_examples=60, deadline=None)
@given(sparse_tensors())
def test_reference_evaluator_and_reader_give_the_weight_back(tensor):
    model = model_of(tensor)
    onnx.checker.check_model(model, full_check=True)
    np.testing.assert_array_equal(ReferenceEvaluator(model).run(None, {})[0], tensor.to_dense())
    found, steps, sources = decode(*parts_of(model), "w")
    np.testing.assert_array_equal(found.mask.positions, tensor.mask.positions)
    np.testing.assert_array_equal(found.values, tensor.values)
    assert len(steps) == 5 and len(sources) == 6


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("positions", [[], [0], [254], [255], [256], [3, 258, 514, 1023], [0, 1, 2, 1023]])
def test_onnxruntime_gives_the_weight_back(positions, dtype):
    tensor = tensor_of((4, 256), positions, dtype)
    session = onnxruntime.InferenceSession(model_of(tensor).SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {})[0], tensor.to_dense())


def test_fillers_stand_only_where_a_distance_exceeds_a_byte():
    distances, values = compact_parts(tensor_of((2000,), [0, 255, 511, 1500]))
    assert distances.tolist() == [0, 255, 255, 1, 255, 255, 255, 224]
    assert values.tolist() == [1, 2, 0, 3, 0, 0, 0, 4]


def test_active_zeros_are_left_out():
    tensor = SparseTensor(Mask((4,), np.array([0, 1, 3])), np.array([0.0, -0.0, 5.0], np.float32))
    assert nonzero(tensor).mask.positions.tolist() == [3]


def test_what_is_not_the_pattern_is_not_decoded():
    model = model_of(tensor_of((8,), [2, 5]))
    nodes, arrays = parts_of(model)
    assert decode(nodes, arrays, "w:flat") is None
    assert decode(nodes, {k: v for k, v in arrays.items() if k != "w:values"}, "w") is None
    nodes["w:positions"].attribute.append(helper.make_attribute("reverse", 1))
    assert decode(nodes, arrays, "w") is None


@pytest.mark.parametrize(
    ("part", "array"),
    [
        ("w:distances", np.array([2, 9], np.uint8)),
        ("w:distances", np.array([2, 0], np.uint8)),
        ("w:distances", np.array([2, 3], np.int64)),
        ("w:values", np.ones(3, np.float32)),
        ("w:zero", np.ones(1, np.float32)),
        ("w:size", np.array([9])),
        ("w:shape", np.array([-1])),
        ("w:shape", np.array([1 << 20, 1 << 20])),
    ],
)
def test_numbers_that_do_not_fit_are_a_format_error(part, array):
    nodes, arrays = parts_of(model_of(tensor_of((8,), [2, 5])))
    arrays[part] = onnx.numpy_helper.from_array(array, part)
    with pytest.raises(FormatError, match="'w' does not decode"):
        decode(nodes, arrays, "w")


def test_values_of_another_type_than_the_nodes_are_refused_by_the_checker():
    model = model_of(tensor_of((8,), [2, 5]))
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.DOUBLE
    with pytest.raises(onnx.shape_inference.InferenceError):
        onnx.checker.check_model(model, full_check=True)
