"""Computations in old operator sets, with free dimensions and automatic padding, are run as ONNX Runtime does."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from dsr_tool.errors import FormatError, UsageError
from dsr_tool.runtime import Session
from exporters.onnx.graph import open_onnx
from exporters.onnx.session import OnnxSession

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 4, 6, 6)).astype(np.float32)
WEIGHT = np.where(RNG.random((4, 4, 3, 3)) < 0.3, RNG.standard_normal((4, 4, 3, 3)), 0).astype(np.float32)


def node(op, inputs, *outputs, **attributes):
    return helper.make_node(op, inputs.split(), list(outputs) or ["y"], **attributes)


def written(tmp_path, opset, nodes, arrays=None, shape=("n", 4, 6, 6), out=("n", "c", "h", "w"), listed=False):
    arrays = {"w": WEIGHT, **(arrays or {})}
    used = {name for one in nodes for name in one.input}
    initializers = [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items() if name in used]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    # Until version 4 of the format, initializers had to be among the inputs.
    more = [helper.make_tensor_value_info(one.name, one.data_type, one.dims) for one in initializers if listed]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, out)]
    graph = helper.make_graph(nodes, "g", inputs + more, outputs, initializers)
    content = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=3 if listed else 8)
    path = tmp_path / "m.onnx"
    path.write_bytes(content.SerializeToString())
    return path


def compare(path, x=X):
    expected = OnnxSession(path, threads=1).run(x)
    for runtime in ("scipy", "auto"):
        found = Session(path, runtime=runtime, batch=len(x)).run(x)
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


CASES = {
    "clip of attributes": (7, [node("Conv", "x w", "c", pads=[1] * 4), node("Clip", "c", min=-0.5, max=0.5)], {}),
    "upsample": (
        9,
        [node("Conv", "x w", "c"), node("Upsample", "c s", mode="nearest")],
        {"s": np.array([1, 1, 2, 2], np.float32)},
    ),
    "upsample between pixels": (
        9,
        [node("Upsample", "x s", mode="linear")],
        {"s": np.array([1, 1, 3, 3], np.float32)},
    ),
    "resize by parts of a pixel": (
        10,
        [node("Resize", "x s", mode="nearest")],
        {"s": np.array([1, 1, 1.5, 1.3], np.float32)},
    ),
    "softmax over the rest": (11, [node("Conv", "x w", "c"), node("Softmax", "c")], {}),
    "slice of attributes": (9, [node("Slice", "x", starts=[1, 0], ends=[3, -1], axes=[1, 2])], {}),
    "pad of attributes": (9, [node("Pad", "x", mode="reflect", pads=[0, 0, 1, 2, 0, 0, 0, 1])], {}),
    "dropout": (9, [node("Dropout", "x", "d", ratio=0.3), node("Relu", "d")], {}),
    "reduction": (12, [node("ReduceMean", "x", axes=[2, 3], keepdims=1)], {}),
    "norm": (
        8,
        [node("Conv", "x w", "c"), node("BatchNormalization", "c a b m v", momentum=0.9)],
        {name: RNG.random(4).astype(np.float32) + 0.5 for name in "abmv"},
    ),
    "split and squeeze": (
        11,
        [
            node("Split", "x", "p", "q", axis=1, split=[1, 3]),
            node("Squeeze", "p", "s", axes=[1]),
            node("Unsqueeze", "s", "u", axes=[1]),
            node("Mul", "u q"),
        ],
        {},
    ),
    "filled shapes": (
        9,
        [
            node("Shape", "x", "s"),
            node("ConstantOfShape", "s", "f", value=numpy_helper.from_array(np.array([2.5], np.float32))),
            node("Add", "x f"),
        ],
        {},
    ),
    "matrix product": (
        7,
        [node("Flatten", "x", "f"), node("Gemm", "f k b", transB=1)],
        {"k": RNG.standard_normal((5, 144)).astype(np.float32), "b": RNG.standard_normal(5).astype(np.float32)},
    ),
    "transposed": (11, [node("ConvTranspose", "x w", strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1])], {}),
}


@pytest.mark.parametrize("name", CASES)
def test_old_operator_sets_are_converted(tmp_path, name):
    opset, nodes, arrays = CASES[name]
    out = ("n", "k") if name == "matrix product" else ("n", "c", "h", "w")
    path = written(tmp_path, opset, nodes, arrays, out=out)
    compare(path)
    model = open_onnx(path)
    assert model.graph.opset == 18
    # Weights keep their names and values, which the converter does not see.
    if "w" in model.graph.parameters:
        np.testing.assert_array_equal(model.tensor("w").to_dense(), WEIGHT)


def test_initializers_among_the_inputs_are_no_inputs(tmp_path):
    path = written(tmp_path, 8, [node("Conv", "x w")], listed=True)
    compare(path)
    assert len(open_onnx(path).graph.inputs) == 1


def test_large_weights_do_not_pass_the_converter(tmp_path, monkeypatch):
    weight = RNG.standard_normal((64, 4, 3, 3)).astype(np.float32)
    path = written(tmp_path, 11, [node("Conv", "x big")], {"big": weight})
    sizes = []
    convert = __import__("onnx").version_converter.convert_version
    monkeypatch.setattr(
        "exporters.onnx.opset.version_converter.convert_version",
        lambda model, version: sizes.append(model.ByteSize()) or convert(model, version),
    )
    compare(path)
    assert max(sizes) < 2000 < weight.nbytes


def test_a_model_that_onnx_cannot_convert_is_refused_in_one_sentence(tmp_path):
    path = written(tmp_path, 8, [node("Scan", "x", body=helper.make_graph([], "b", [], []), num_scan_inputs=1)])
    with pytest.raises(FormatError, match="subgraph|not an ONNX file") as caught:
        Session(path)
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize("shape", [(-1, 4, -1, -1), (-1, 4, 6, 6), ("n", 4, "h", "h"), (None, 4, None, 6)])
def test_dimensions_of_any_size_are_free(tmp_path, shape):
    path = written(tmp_path, 12, [node("Conv", "x w")], shape=shape, out=(-1, 4, -1, -1))
    assert open_onnx(path).graph.inputs[0].shape == tuple(n if n in (4, 6) else None for n in shape)
    compare(path)
    if None in open_onnx(path).graph.inputs[0].shape[2:]:
        compare(path, X[:, :, :5])


def test_other_negative_sizes_are_refused(tmp_path):
    with pytest.raises(FormatError, match="'x' has a negative size"):
        Session(written(tmp_path, 12, [node("Relu", "x")], shape=("n", -2, 6, 6)))


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (3, 1)])
@pytest.mark.parametrize("kernel", [(3, 3), (2, 4), (1, 5)])
def test_automatic_padding_of_known_sizes_is_explicit(tmp_path, auto_pad, strides, kernel):
    weight = RNG.standard_normal((4, 4, *kernel)).astype(np.float32)
    # ONNX Runtime fails where a pool has a stride above its kernel.
    steps = [min(pair) for pair in zip(kernel, strides, strict=True)]
    nodes = [
        node("Conv", "x k", "c", auto_pad=auto_pad, strides=strides),
        node("MaxPool", "c", "m", auto_pad=auto_pad, strides=steps, kernel_shape=kernel),
        node("AveragePool", "m", auto_pad=auto_pad, kernel_shape=(2, 2)),
    ]
    path = written(tmp_path, 11, nodes, {"k": weight}, shape=("n", 4, 9, 10))
    x = RNG.standard_normal((2, 4, 9, 10)).astype(np.float32)
    compare(path, x)
    assert not any("auto_pad" in one.attributes for one in open_onnx(path).graph)


def test_automatic_padding_of_unknown_sizes_depends_on_the_stride(tmp_path):
    compare(written(tmp_path, 11, [node("Conv", "x w", auto_pad="SAME_UPPER")], shape=("n", 4, "h", "w")))
    path = written(tmp_path, 11, [node("Conv", "x w", auto_pad="SAME_UPPER", strides=[2, 2])], shape=("n", 4, "h", "w"))
    with pytest.raises(UsageError, match="SAME_UPPER"):
        Session(path, runtime="scipy").run(X)


@pytest.mark.parametrize("kind", [TensorProto.UINT8, TensorProto.INT64])
def test_inputs_of_whole_numbers_leave_weights_alone(tmp_path, kind):
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    path = written(tmp_path, 12, [node("Cast", "x", "f", to=TensorProto.FLOAT), node("Conv", "f w")])
    content = __import__("onnx").load(path)
    content.graph.input[0].type.tensor_type.elem_type = kind
    path.write_bytes(content.SerializeToString())
    compare(path, RNG.integers(0, 200, X.shape).astype(dtype))
