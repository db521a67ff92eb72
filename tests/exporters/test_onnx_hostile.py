"""ONNX files from strangers load or are refused in one sentence; they never end or occupy the process."""

import random
import time

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dsr_tool.errors import DsrError, FormatError
from dsr_tool.graph.ir import Graph, Node, Value
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor
from exporters.onnx.read import read_onnx
from exporters.onnx.write import to_onnx

pytestmark = pytest.mark.usefixtures("trace_once")


def read(path, content):
    """Reads these bytes; returns the seconds of processor time that it takes."""
    path.write_bytes(content)
    start = time.process_time()
    file = read_onnx(path)
    for name in file.entries:
        file.tensor(name)
    return time.process_time() - start


def saved(nodes, initializers=(), sparse=(), opset=18, inputs=("x",)):
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in (*inputs, "y")]
    graph = helper.make_graph(nodes, "g", values[:-1], values[-1:], initializers, sparse_initializer=sparse)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    return model.SerializeToString()


def weight(name="w", array=None):
    return numpy_helper.from_array(np.eye(4, dtype=np.float32) if array is None else array, name)


MATMUL = helper.make_node("MatMul", ["x", "w"], ["y"])


@pytest.mark.parametrize("encoding", ["auto", "delta", "bitmask", "coo"])
def test_flipped_cut_and_spliced_files_are_read_or_refused_quickly(make_model, captured, tmp_path, encoding):
    model = make_model(0.9)
    sound = [
        to_onnx(captured, model.tensors(), encoding=encoding, values=values, specs=model.specs).SerializeToString()
        for values in ("fp32", "fp16")
    ]
    rng = random.Random(encoding)  # noqa: S311
    for i in range(120):
        content = bytearray(sound[i % 2])
        first, second = sorted(rng.sample(range(len(content)), 2))
        if i % 3 == 0:
            for _ in range(rng.choice((1, 3))):
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        elif i % 3 == 1:
            del content[first : rng.choice((second, len(content)))]
        else:
            content[first : first + 40] = sound[(i + 1) % 2][second : second + 40]
        try:
            assert read(tmp_path / "m.onnx", bytes(content)) < 2
        except DsrError as error:
            assert str(error).endswith(".") and "Traceback" not in str(error)


def of_weights(count, side):
    """Builds a file of weights with one active entry each."""
    weights = {f"w{i}": SparseTensor(Mask((side, side), np.array([7])), np.ones(1, np.float32)) for i in range(count)}
    nodes = tuple(Node("Relu", (name,), (f"y{name}",)) for name in weights)
    graph = Graph((Value("x", (1,)),), (Value("yw0", (side, side)),), nodes, {}, tuple(weights), 18)
    return to_onnx(graph, weights, encoding="delta").SerializeToString()


def test_weights_are_counted_before_they_are_decoded(tmp_path, monkeypatch):
    assert read(tmp_path / "m.onnx", of_weights(2, 1 << 11)) < 2
    with pytest.raises(FormatError, match="claims weights of 1,073,741,824 bytes"):
        read(tmp_path / "m.onnx", of_weights(1, 1 << 14))
    monkeypatch.setattr("dsr_tool.formats.manifest._MAX_DECODED_RATIO", 1 << 40)
    assert read(tmp_path / "m.onnx", of_weights(4, 1 << 15)) < 2
    with pytest.raises(FormatError, match="more than the 17,179,869,184"):
        read(tmp_path / "m.onnx", of_weights(5, 1 << 15))


@pytest.mark.parametrize(
    "content",
    [
        saved([MATMUL], [weight(), weight()]),
        saved([helper.make_node("Relu", ["x"], ["w"]), MATMUL], [weight()]),
        saved([helper.make_node("Relu", ["b"], ["a"]), helper.make_node("Relu", ["a"], ["b"]), MATMUL], [weight()]),
        saved([helper.make_node("Relu", ["y"], ["x"])]),
    ],
    ids=["two initializers", "an initializer and a node", "a cycle", "nothing makes it"],
)
def test_names_that_are_defined_twice_or_never_are_refused(tmp_path, content):
    with pytest.raises(FormatError, match=r"damaged"):
        read(tmp_path / "m.onnx", content)


def test_sizes_that_no_tensor_has_are_refused(tmp_path):
    for dims in ([-1, 4], [1 << 62, 4], [1 << 33, 1 << 33], [0, -4]):
        tensor = weight()
        del tensor.dims[:]
        tensor.dims.extend(dims)
        with pytest.raises(FormatError):
            read(tmp_path / "m.onnx", saved([MATMUL], [tensor]))
    values, indices = weight("w", np.ones(1, np.float32)), weight("i", np.array([3], np.int64))
    for dims in ([-2, -8], [1 << 62, 1 << 62], [1 << 33, 4]):
        with pytest.raises(FormatError):
            read(tmp_path / "m.onnx", saved([MATMUL], sparse=[helper.make_sparse_tensor(values, indices, dims)]))


def test_vectors_of_any_length_are_not_followed(tmp_path):
    for size in (1 << 24, 1 << 40):
        nodes = [
            helper.make_node("ConstantOfShape", ["s"], ["long"], value=weight("v", np.zeros(1, np.int64))),
            helper.make_node("Mul", ["long", "long"], ["square"]),
            helper.make_node("Concat", ["square", "square"], ["twice"], axis=0),
            helper.make_node("Shape", ["twice"], ["few"]),
            MATMUL,
        ]
        content = saved(nodes, [weight(), weight("s", np.array([size]))])
        assert read(tmp_path / "m.onnx", content) < 2
    doubling = [helper.make_node("Concat", [f"c{i}", f"c{i}"], [f"c{i + 1}"], axis=0) for i in range(40)]
    content = saved([helper.make_node("Shape", ["x"], ["c0"]), *doubling, MATMUL], [weight()])
    assert read(tmp_path / "m.onnx", content) < 2


def test_deep_nesting_is_refused(tmp_path):
    def field(number, content):
        size, length = len(content), bytearray()
        while size > 127:
            length.append(size & 127 | 128)
            size >>= 7
        return bytes([number << 3 | 2]) + bytes([*length, size]) + content

    graph = b""
    for _ in range(5000):  # a graph as the attribute of a node of a graph
        graph = field(1, field(5, field(6, graph)))
    with pytest.raises(FormatError, match="not an ONNX file"):
        read(tmp_path / "m.onnx", b"\x08\x09" + field(7, graph))


def test_external_tensors_inside_subgraphs_are_refused(tmp_path):
    outside = TensorProto(name="k", dims=[4, 4], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    outside.external_data.add(key="location", value="/etc/passwd")
    body = helper.make_graph(
        [helper.make_node("Identity", ["k"], ["r"])],
        "b",
        [],
        [helper.make_tensor_value_info("r", TensorProto.FLOAT, [4, 4])],
        [outside],
    )
    nodes = [
        helper.make_node("If", ["c"], ["w"], then_branch=body, else_branch=body),
        MATMUL,
    ]
    with pytest.raises(FormatError, match="not in its folder"):
        read(tmp_path / "m.onnx", saved(nodes, [weight("c", np.array(True))]))


def test_operators_of_other_domains_do_not_count_as_products(tmp_path):
    foreign = helper.make_node("Conv", [], ["q"], domain="mine")
    model = onnx.load_model_from_string(saved([foreign, MATMUL], [weight()]))
    model.opset_import.add(domain="mine", version=1)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    file = read_onnx(tmp_path / "m.onnx")
    assert file.entries["w"].spec.kind == "MatMul" and file.entries["w"].active == 4


def test_metadata_of_any_kind_is_harmless(tmp_path):
    for text in ("[" * 100_000, '{"sparse_weights": 3, "architecture": ["/etc"]}', "not JSON", "{}"):
        model = onnx.load_model_from_string(saved([MATMUL], [weight()]))
        helper.set_model_props(model, {"dsr_tool": text})
        assert read(tmp_path / "m.onnx", model.SerializeToString()) < 2
