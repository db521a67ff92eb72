"""Compact forms of weights: ONNX's evaluator, ONNX Runtime, OpenVINO and the reader restore the same weights."""

import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from dsr_tool.errors import FormatError, UsageError
from dsr_tool.graph.ir import Graph, Node, Value
from dsr_tool.sparsity.layers import LayerSpec
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor
from exporters.onnx.decode import decode, find
from exporters.onnx.forms import COMPACT_FORMS, bitmask_form, delta_form, nonzero
from exporters.onnx.write import to_onnx

COMPACT = ("auto", "delta", "bitmask")
# The evaluator of onnx 1.17 makes int64 of int32 here, which the standard does not.
SUM = onnx.parser.parse_graph(
    "g (int32[2] x) => (int32[2] y) { a = Constant <value = int64 {0}> () y = CumSum (x, a) }"
)
EVALUATOR_IS_RIGHT = ReferenceEvaluator(SUM, {"": 18}).run(None, {"x": np.ones(2, np.int32)})[0].dtype == np.int32


def tensor_of(shape, positions, dtype=np.float32):
    positions = np.array(sorted(positions), np.int64)
    return SparseTensor(Mask(shape, positions), (np.arange(len(positions)) % 2000 + 1).astype(dtype))


def model_of(*tensors, encoding="delta", values="fp32", dtype="float32"):
    """Builds a model whose outputs are the tensors plus its input, a single number."""
    weights = {f"w{i}": tensor for i, tensor in enumerate(tensors)}
    nodes = tuple(Node("Add", ("x", name), (f"y_{name}",)) for name in weights)
    outputs = tuple(Value(f"y_{name}", tensor.mask.shape, dtype) for name, tensor in weights.items())
    graph = Graph((Value("x", (1,), dtype),), outputs, nodes, {}, tuple(weights), 18)
    specs = {name: LayerSpec(name, t.mask.shape, "Linear", "sparse", True, "") for name, t in weights.items()}
    return to_onnx(graph, weights, encoding=encoding, values=values, specs=specs)


def parts_of(model):
    nodes = {node.output[0]: node for node in model.graph.node}
    return nodes, {tensor.name: tensor for tensor in model.graph.initializer}


def computed(model, dtype=np.float32):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.zeros(1, dtype)})


@st.composite
def sparse_tensors(draw):
    shape = tuple(draw(st.lists(st.integers(1, 24), min_size=1, max_size=3)))
    size = int(np.prod(shape))
    if draw(st.booleans()):
        return tensor_of(shape, draw(st.sets(st.integers(0, size - 1), max_size=min(30, size - 1))))
    density = draw(st.sampled_from([0.02, 0.1, 0.3, 0.6, 0.95]))
    active = np.random.default_rng(draw(st.integers(0, 999))).random(size) < density
    return tensor_of(shape, np.flatnonzero(active)[: size - 1])


@settings(max_examples=40, deadline=None)
@given(sparse_tensors(), st.sampled_from(COMPACT), st.sampled_from(["fp32", "fp16"]))
def test_evaluator_runtime_and_reader_restore_the_weight(tensor, encoding, values):
    model = model_of(tensor, encoding=encoding, values=values)
    onnx.checker.check_model(model, full_check=True)
    expected = tensor.to_dense()
    if EVALUATOR_IS_RIGHT:
        assert np.array_equal(ReferenceEvaluator(model).run(None, {"x": np.zeros(1, np.float32)})[0], expected)
    assert np.array_equal(computed(model)[0], expected)
    found = find("w0", *parts_of(model))
    assert found is not None or encoding == "auto"
    if found:
        read = decode(found, parts_of(model)[1])
        assert np.array_equal(read.mask.positions, tensor.mask.positions)
        assert read.values.dtype == {"fp32": np.float32, "fp16": np.float16}[values]
        assert np.array_equal(read.values, tensor.values)


@settings(max_examples=40, deadline=None)
@given(st.lists(sparse_tensors(), min_size=1, max_size=4))
def test_auto_is_never_larger_than_any_other(tensors):
    sizes = {encoding: model_of(*tensors, encoding=encoding).ByteSize() for encoding in (*COMPACT, "dense")}
    assert sizes["auto"] == min(sizes.values())


@pytest.mark.parametrize("positions", [[], [0], [254], [255], [256], [3, 258, 514, 1023], [0, 1, 2, 1023]])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_onnxruntime_restores_weights_of_both_types(positions, dtype):
    tensor = tensor_of((4, 256), positions, dtype)
    for encoding in ("delta", "bitmask", "coo"):
        for values in ("fp32", "fp16"):
            model = model_of(tensor, encoding=encoding, values=values, dtype=dtype)
            onnx.checker.check_model(model)
            assert np.array_equal(computed(model, dtype)[0], tensor.to_dense())


_OPENVINO = """
import sys
import numpy as np
import openvino
for path in sys.argv[1:]:
    results = openvino.compile_model(openvino.Core().read_model(path), "CPU")(np.zeros(1, np.float32))
    np.savez(path + ".npz", *(results[i] for i in range(len(results))))
"""


def by_openvino(folder, models):
    """Returns the outputs of each model in OpenVINO.

    It runs in a process of its own: it leaves the main thread with a signal stack that it has freed, and the next
    signal that a handler takes would end the process.
    """
    paths = [folder / f"{i}.onnx" for i in range(len(models))]
    for path, content in zip(paths, models, strict=True):
        path.write_bytes(content.SerializeToString())
    subprocess.run([sys.executable, "-c", _OPENVINO, *map(str, paths)], check=True, capture_output=True)
    outputs = []
    for path in paths:
        with np.load(f"{path}.npz") as found:
            outputs.append([found[f"arr_{i}"] for i in range(len(found))])
    return outputs


def test_openvino_restores_the_weights(tmp_path):
    pytest.importorskip("openvino")
    random = np.random.default_rng(0)
    shapes = ((8, 5, 3, 3), (64, 40), (7, 11), (300, 301))
    densities = (0.5, 0.1, 0.3, 0.01)
    tensors = [
        tensor_of(shape, np.flatnonzero(random.random(np.prod(shape)) < density))
        for shape, density in zip(shapes, densities, strict=True)
    ]
    variants = [(encoding, values) for encoding in COMPACT for values in ("fp32", "fp16")]
    models = [model_of(*tensors, encoding=encoding, values=values) for encoding, values in variants]
    for results in by_openvino(tmp_path, models):
        for result, tensor in zip(results, tensors, strict=True):
            assert np.array_equal(result, tensor.to_dense())


@pytest.mark.parametrize(("bits", "code"), [(8, [0, 254, 255, 0, 255, 255, 223]), (4, None)])
def test_steps_fill_whole_bytes_and_gaps_take_several(bits, code):
    own = delta_form(tensor_of((2000,), [0, 255, 511, 1245]), bits).own
    assert code is None or own["code"].tolist() == code
    fillers = len(own["values"]) - 1 - 4
    assert 0 <= fillers < 8 // bits and own["values"][0] == 0
    assert np.count_nonzero(own["values"]) == 4


def test_weights_in_which_no_step_can_be_split():
    assert delta_form(tensor_of((4,), range(3)), 4) is not None  # one more entry may follow
    assert delta_form(tensor_of((4,), [0, 1, 3]), 4) is not None  # the last step can be split
    assert delta_form(SparseTensor(Mask((3,), np.arange(3)), np.ones(3, np.float32)), 4) is None
    assert delta_form(tensor_of((0, 3), []), 8) is None


def test_weights_without_entries():
    own = delta_form(tensor_of((3,), []), 8).own
    assert own["code"].tolist() == [0] and own["values"].tolist() == [0, 0]


def test_the_first_entry_is_the_highest_bit():
    assert bitmask_form(tensor_of((3,), [1])).own["code"].tolist() == [0b01000000]


def test_steps_of_2_bits_are_refused_in_one_sentence():
    """Development versions wrote them, with tables of four steps per byte."""
    nodes, arrays = parts_of(model_of(tensor_of((8,), [2, 5])))
    found = find("w0", nodes, arrays)
    for leaf in ("flags", "steps"):
        arrays[found.leaves[leaf]] = numpy_helper.from_array(np.ones((256, 4), np.uint8), leaf)
    with pytest.raises(FormatError, match=r"^weight 'w0' is stored in steps of 2 bits.*; export the model again\.$"):
        decode(found, arrays)


def test_positions_beyond_32_bits_stay_dense():
    huge = SparseTensor(Mask((1 << 16, 1 << 16), np.array([5])), np.ones(1, np.float32))
    assert all(encode(huge) is None for encode in COMPACT_FORMS.values())


def test_active_zeros_are_dropped():
    tensor = SparseTensor(Mask((4,), np.array([0, 1, 3])), np.array([0.0, -0.0, 5.0], np.float32))
    assert nonzero(tensor).mask.positions.tolist() == [3]


def test_float16_that_overflows_names_the_weight():
    tensor = SparseTensor(Mask((4,), np.array([1])), np.array([7e4], np.float32))
    with pytest.raises(UsageError, match="'w0'"):
        model_of(tensor, values="fp16")


def test_nodes_that_differ_from_a_form_are_not_matched():
    model = model_of(tensor_of((8,), [2, 5]))
    nodes, arrays = parts_of(model)
    leaves = find("w0", nodes, arrays).leaves
    assert find(nodes["w0"].input[0], nodes, arrays) is None
    assert find("w0", nodes, {name: array for name, array in arrays.items() if name != leaves["values"]}) is None
    sums = [node for node in nodes.values() if node.op_type == "CumSum"]
    sums[0].attribute.append(onnx.helper.make_attribute("reverse", 1))
    assert find("w0", nodes, arrays) is None


BROKEN = [
    ("delta", "code", np.array([2, 9], np.uint8)),
    ("delta", "code", np.array([2, 2], np.int64)),
    ("delta", "code", np.array([[2, 2]], np.uint8)),
    ("delta", "code", np.zeros(9, np.uint8)),
    ("delta", "steps", np.zeros((256, 1), np.uint8)),
    ("delta", "steps", np.ones(256, np.uint8)),
    ("delta", "flags", np.ones((256, 3), np.uint8)),
    ("delta", "before", np.array(-2, np.int32)),
    ("delta", "zero", np.ones(1, np.float32)),
    ("delta", "size", np.array([9])),
    ("bitmask", "code", np.array([0xFF, 0xFF], np.uint8)),
    ("bitmask", "code", np.array([0x24, 0x00], np.uint8)),
    ("bitmask", "axis", np.array(1)),
    *((codec, "values", values) for codec in ("delta", "bitmask") for values in (np.ones(3, np.float32), np.zeros(3))),
    *((codec, "values", np.zeros(9, np.float32)) for codec in ("delta", "bitmask")),
    *((codec, "shape", np.array(shape)) for codec in ("delta", "bitmask") for shape in ([-1], [1 << 20] * 4, [3.0])),
]


@pytest.mark.parametrize(("codec", "leaf", "array"), BROKEN)
def test_inconsistent_parts_are_a_format_error(codec, leaf, array):
    nodes, arrays = parts_of(model_of(tensor_of((8,), [2, 5]), encoding=codec))
    found = find("w0", nodes, arrays)
    if leaf == "values" and array.dtype == np.float64:
        array = np.array([0, 1], np.int64)
    arrays[found.leaves[leaf]] = numpy_helper.from_array(array, leaf)
    with pytest.raises(FormatError, match="weight 'w0'"):
        decode(found, arrays)


def test_the_example_of_the_documentation():
    # docs/format.md, section ONNX.
    own = delta_form(tensor_of((4, 5), [1, 2, 9, 19]), 4).own
    assert own["code"].tolist() == [0x10, 0x69]
    assert own["values"].tolist() == [0, 1, 2, 3, 4]
