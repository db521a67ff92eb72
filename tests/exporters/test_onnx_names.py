"""Nodes and values of ONNX files have names of their own, which say where they come from, whatever the form."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest

from dsr_tool.graph.ir import Graph, Node, Value
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor
from exporters.onnx.write import to_onnx

SHAPES = {"layer.0.conv.weight": (16, 8, 3, 3), "layer.0.conv.bias": (16,), "shared": (16, 16), "fc.weight": (16, 16)}
NODES = (
    Node("Conv", ("x", "layer.0.conv.weight", "layer.0.conv.bias"), ("c",), {"pads": (1, 1, 1, 1)}),
    Node("Relu", ("c",), ("r",)),
    Node("GlobalAveragePool", ("r",), ("p",)),
    Node("Flatten", ("p",), ("f",)),
    # One module that is called twice, and a value with the name that its second node would have.
    Node("Gemm", ("f", "fc.weight"), ("g",)),
    Node("Gemm", ("g", "fc.weight"), ("h",)),
    Node("Relu", ("h",), ("fc/Gemm_2",)),
    # A weight that is no part of a module, called as the parts that all weights share.
    Node("MatMul", ("fc/Gemm_2", "shared"), ("y",)),
)
GRAPH = Graph((Value("x", (None, 8, 6, 6)),), (Value("y", (None, 16)),), NODES, {}, tuple(SHAPES), 20)
ENCODINGS = ("auto", "delta", "bitmask", "coo", "dense")


def tensors(density: float = 0.2) -> dict[str, SparseTensor]:
    rng = np.random.default_rng(0)
    return {
        name: SparseTensor.from_dense(
            rng.standard_normal(shape).astype("f4"),
            Mask.from_bool(rng.random(shape) < density) if len(shape) > 1 else Mask.full(shape),
        )
        for name, shape in SHAPES.items()
    }


def values(model: onnx.ModelProto) -> list[str]:
    graph = model.graph
    stored = [*(one.name for one in graph.initializer), *(one.values.name for one in graph.sparse_initializer)]
    return [one.name for one in graph.input] + stored + [name for node in graph.node for name in node.output]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("stored", ["fp32", "fp16"])
def test_every_node_and_value_has_a_name_of_its_own(encoding, stored):
    specs = None
    if stored == "fp16":
        from dsr_tool.sparsity.layers import LayerSpec

        specs = {name: LayerSpec(name, shape, "", "sparse", len(shape) > 1, "") for name, shape in SHAPES.items()}
    model = to_onnx(GRAPH, tensors(), encoding=encoding, values=stored, specs=specs)
    for names in ([node.name for node in model.graph.node], values(model)):
        assert all(names)
        assert len(names) == len(set(names))


def test_names_say_the_weight_or_the_module_and_the_operator():
    model = to_onnx(GRAPH, tensors(), encoding="delta")
    names = {node.name: node.output[0] for node in model.graph.node}
    assert names["layer.0.conv/Conv"] == "c"
    assert names["r"] == "r"
    assert (names["fc/Gemm"], names["fc/Gemm_2"], names["fc/Gemm_2_2"]) == ("g", "h", "fc/Gemm_2")
    decoding = [name for name in names if name.startswith("layer.0.conv.weight/")]
    assert {"layer.0.conv.weight/CumSum", "layer.0.conv.weight/Gather"} <= set(decoding)
    assert [name for name in decoding if names[name] == "layer.0.conv.weight"] == decoding[-1:]
    stored = [one.name for one in model.graph.initializer]
    assert {"layer.0.conv.weight/values", "shared/values_01", "fc.weight/values", "layer.0.conv.bias"} <= set(stored)
    # Tables that all three weights read are named after none of them.
    assert any(name.startswith("shared/") and name[-2:].isdigit() for name in stored)


def test_names_depend_on_the_model_alone():
    contents = {to_onnx(GRAPH, tensors(), encoding="auto").SerializeToString(deterministic=True) for _ in range(2)}
    assert len(contents) == 1


@pytest.mark.parametrize("density", [0.02, 0.1, 0.2, 0.5, 0.9])
def test_auto_takes_the_smallest_form_with_all_names(density):
    sizes = {one: to_onnx(GRAPH, tensors(density), encoding=one).ByteSize() for one in ENCODINGS if one != "coo"}
    assert sizes["auto"] == min(sizes.values())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("encoding", ["auto", "delta", "bitmask", "dense"])
def test_the_usual_converter_to_float16_takes_the_file(encoding):
    float16 = pytest.importorskip("onnxconverter_common.float16")
    model = to_onnx(GRAPH, tensors(), encoding=encoding)
    half = float16.convert_float_to_float16(model, keep_io_types=True)
    x = np.random.default_rng(1).standard_normal((2, 8, 6, 6)).astype("f4")
    expected, found = (
        onnxruntime.InferenceSession(one.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
        for one in (model, half)
    )
    np.testing.assert_allclose(found, expected, rtol=0.02, atol=0.02 * float(np.abs(expected).max()))
