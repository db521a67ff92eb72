"""ONNX files of any tool become networks of torch that compute the same, and can be pruned, trained and exported."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import dsr_tool
from converters.conversion import convert
from converters.graph_functions import FUNCTIONS
from converters.onnx_files import load
from converters.sources import build_structure
from dsr_tool.errors import CheckFailed, FileError, FormatError, UsageError
from exporters.export import export, export_onnx
from exporters.onnx.session import OnnxSession

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 4, 12, 10)).astype(np.float32)


def floats(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) * 0.3).astype(np.float32)


def node(op, inputs, *outputs, **attributes):
    return helper.make_node(op, inputs.split(), list(outputs) or ["y"], **attributes)


def written(tmp_path, nodes, arrays, *, opset=18, shape=("n", 4, 12, 10), outputs=("y",)):
    used = {name for one in nodes for name in one.input}
    initializers = [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items() if name in used]
    values = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    results = [helper.make_empty_tensor_value_info(name) for name in outputs]
    for result in results:
        result.type.tensor_type.elem_type = TensorProto.FLOAT
    graph = helper.make_graph(nodes, "g", values, results, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    model = onnx.shape_inference.infer_shapes(model)
    path = tmp_path / "net.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def compare(path, x=X, **options):
    module, config = load(str(path), **options)
    module.eval()
    for batch in (x, x[:1]):
        expected = OnnxSession(path, threads=1).run_all(batch)
        with torch.no_grad():
            found = module(torch.from_numpy(batch))
        found = found if isinstance(found, dict) else {next(iter(expected)): found}
        assert list(found) == list(expected)
        for name, array in expected.items():
            scale = np.abs(array).max()
            assert found[name].shape == array.shape
            np.testing.assert_allclose(found[name].numpy(), array, rtol=1e-5, atol=1e-5 * scale)
    # The description alone gives the same structure.
    structure = build_structure(config)
    assert {n: t.shape for n, t in structure.state_dict().items()} == {
        n: t.shape for n, t in module.state_dict().items()
    }
    return module


ARRAYS = {
    "stem.conv.weight": floats(8, 4, 3, 3),
    "stem.conv.bias": floats(8),
    "deep.weight": floats(8, 1, 3, 3),
    "up": floats(8, 6, 2, 2),
    **{f"norm.{name}": floats(8) for name in ("weight", "bias", "mean")},
    "norm.var": floats(8) ** 2 + 0.5,
    "fc": floats(6, 5),
    "gemm.weight": floats(5, 6),
    "b": floats(5),
    "slope": floats(8, 1, 1),
    "scale": floats(8, 1, 1),
    "three": np.array([3], np.float32),
    "zero": np.array(0, np.float32),
    "six": np.array(6, np.float32),
    "axes": np.array([2, 3], np.int64),
    "last": np.array([-1], np.int64),
    "one": np.array([1], np.int64),
    "start": np.array([0], np.int64),
    "end": np.array([1], np.int64),
    "rest": np.array([-1], np.int64),
    "scales": np.array([1, 1, 2, 2], np.float32),
    "pads": np.array([0, 0, 1, 2, 0, 0, 0, 1], np.int64),
    "flat": np.array([0, -1], np.int64),
}
STEM = node("Conv", "x stem.conv.weight stem.conv.bias", "c", pads=[1] * 4)
CASES: dict[str, tuple[list[onnx.NodeProto], str]] = {
    "conv and norm": (
        [STEM, node("BatchNormalization", "c norm.weight norm.bias norm.mean norm.var", "n"), node("Relu", "n")],
        "Conv2d BatchNorm2d",
    ),
    "pads that differ": ([node("Conv", "x stem.conv.weight", pads=[1, 0, 2, 1], strides=[2, 1])], "Conv2d"),
    "depthwise": ([STEM, node("Conv", "c deep.weight", group=8)], "Conv2d Conv2d"),
    "transposed": (
        [STEM, node("ConvTranspose", "c up", strides=[2, 2], pads=[1] * 4, output_padding=[1, 1])],
        "Conv2d ConvTranspose2d",
    ),
    "hard swish in parts": (
        [
            STEM,
            node("Add", "c three", "a"),
            node("Clip", "a zero six", "k"),
            node("Mul", "c k", "m"),
            node("Div", "m six"),
        ],
        "Conv2d",
    ),
    "scale per channel": ([STEM, node("Mul", "c scale", "s"), node("PRelu", "s slope")], "Conv2d"),
    "pools": (
        [
            STEM,
            node("MaxPool", "c", "p", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 0, 1]),
            node("AveragePool", "p", kernel_shape=[3, 2], pads=[1, 0, 1, 1], count_include_pad=0),
        ],
        "Conv2d",
    ),
    "head": (
        [STEM, node("ConvTranspose", "c up", "t"), node("ReduceMean", "t axes", "r", keepdims=0),
         node("MatMul", "r fc")],
        "Conv2d ConvTranspose2d Linear",
    ),
    "gemm": (
        [
            STEM,
            node("ConvTranspose", "c up", "t"),
            node("GlobalAveragePool", "t", "g"),
            node("Flatten", "g", "f"),
            node("Gemm", "f gemm.weight b", transB=1),
        ],
        "Conv2d ConvTranspose2d Linear",
    ),
    "sizes from shapes": (
        [
            STEM,
            node("Shape", "c", "s"),
            node("Slice", "s start end", "n"),
            node("Concat", "n rest", "to", axis=0),
            node("Reshape", "c to"),
        ],
        "Conv2d",
    ),
    "resized and padded": (
        [STEM, node("Resize", "c  scales", "z", mode="nearest", coordinate_transformation_mode="asymmetric",
                    nearest_mode="floor"), node("Pad", "z pads", mode="edge")],
        "Conv2d",
    ),
    "attention": (
        [
            STEM,
            node("Reshape", "c flat", "r"),
            node("Unsqueeze", "r one", "u"),
            node("Transpose", "u", "v", perm=[0, 2, 1]),
            node("MatMul", "u v", "q"),
            node("Softmax", "q", "w", axis=-1),
            node("MatMul", "w u"),
        ],
        "Conv2d",
    ),
    "weight of two layers": (
        [node("Conv", "x stem.conv.weight", "c", pads=[1] * 4), node("Conv", "x stem.conv.weight", "d", pads=[1] * 4),
         node("Add", "c d")],
        "Conv2d",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_networks_compute_what_the_file_computes(tmp_path, name):
    nodes, kinds = CASES[name]
    nodes = [onnx.NodeProto.FromString(one.SerializeToString()) for one in nodes]
    for one in nodes:
        if one.op_type == "Resize":
            one.input[:] = ["c", "", "scales"]
    module = compare(written(tmp_path, nodes, ARRAYS))
    layers = [type(one).__name__ for one in module.modules() if next(one.parameters(recurse=False), None) is not None]
    assert [kind for kind in layers if kind not in ("Module", "GraphNetwork")] == kinds.split()


FORMS = {
    "selu with its own numbers": [node("Selu", "x", alpha=2.0, gamma=0.5)],
    "limits of whole numbers": [
        node("Cast", "x", "i", to=TensorProto.INT32),
        node("Clip", "i low high", "k"),
        node("Div", "k high", "d"),
        node("Cast", "d", to=TensorProto.FLOAT),
    ],
    "window behind the pixels": [
        node("MaxPool", "x", kernel_shape=[2, 2], strides=[3, 3], ceil_mode=1, pads=[0, 0, 1, 1])
    ],
    "size rounded to float32": [node("Resize", "x  third", mode="linear")],
    "twice as large": [node("Resize", "x  scales", mode="nearest", coordinate_transformation_mode="asymmetric")],
    "three times as large": [node("Resize", "x  triple", mode="nearest")],
    "shape of a weight in a fixed batch": [node("Reshape", "bias column", "r"), node("Add", "x r")],
}
FORM_ARRAYS = {
    "low": np.array(-1, np.int32),
    "high": np.array(2, np.int32),
    "scales": np.array([1, 1, 2, 2], np.float32),
    "triple": np.array([1, 1, 3, 3], np.float32),
    "third": np.array([1, 1, 1.5, 1.3], np.float32),
    "bias": floats(4),
    "column": np.array([1, 4, 1, 1], np.int64),
}


def resized(nodes):
    """Gives each Resize its absent second input, which a list of words cannot have."""
    nodes = [onnx.NodeProto.FromString(one.SerializeToString()) for one in nodes]
    for one in nodes:
        if one.op_type == "Resize":
            one.input[:] = ["x", "", one.input[1]]
    return nodes


@pytest.mark.parametrize("name", FORMS)
def test_rare_forms_of_operators_are_computed(tmp_path, name):
    batch = 1 if "fixed" in name else "n"
    path = written(tmp_path, resized(FORMS[name]), FORM_ARRAYS, shape=(batch, 4, 12, 10))
    compare(path, 3 * X[: 1 if batch == 1 else None])


@pytest.mark.parametrize(
    ("scales", "attributes"),
    [
        ("triple", {"mode": "nearest", "coordinate_transformation_mode": "asymmetric"}),
        ("triple", {"mode": "nearest", "nearest_mode": "floor"}),
        ("triple", {"mode": "nearest", "nearest_mode": "ceil"}),
        ("triple", {"mode": "cubic", "exclude_outside": 1}),
        ("part", {"mode": "linear"}),
        ("channels", {"mode": "nearest"}),
    ],
)
def test_a_resize_that_torch_lacks_is_refused(tmp_path, scales, attributes):
    arrays = {
        **FORM_ARRAYS,
        "part": np.array([1, 1, 1.3, 1.3], np.float32),
        "channels": np.array([1, 2, 1, 1], np.float32),
    }
    path = written(tmp_path, resized([node("Resize", f"x {scales}", **attributes)]), arrays)
    with pytest.raises(UsageError, match="Resize"):
        load(str(path))


def test_names_of_weights_are_kept_and_numbers_are_not_trained(tmp_path):
    module = compare(written(tmp_path, CASES["hard swish in parts"][0], ARRAYS))
    assert list(module.state_dict()) == ["stem.conv.weight", "stem.conv.bias"]


def test_several_outputs_have_their_names(tmp_path):
    nodes = [STEM, node("Relu", "c", "y"), node("Sigmoid", "c", "z")]
    compare(written(tmp_path, nodes, ARRAYS, outputs=("y", "z")))


def test_a_fixed_batch_becomes_free(tmp_path):
    arrays = {**ARRAYS, "flat": np.array([2, -1], np.int64)}
    nodes = [STEM, node("Reshape", "c flat")]
    path = written(tmp_path, nodes, arrays, shape=(2, 4, 12, 10))
    module, _ = load(str(path))
    with torch.no_grad():
        assert module.eval()(torch.from_numpy(X[:1])).shape == (1, 960)
        np.testing.assert_allclose(module(torch.from_numpy(X)), OnnxSession(path).run(X), rtol=1e-5, atol=1e-5)


def test_an_old_operator_set_and_any_size_are_taken_with_a_shape(tmp_path):
    nodes = [node("Conv", "x stem.conv.weight", "c"), node("Clip", "c", min=0.0, max=6.0)]
    path = written(tmp_path, nodes, ARRAYS, opset=9, shape=("n", 4, "h", "w"))
    compare(path, input_shape=(4, 12, 10))
    for shape in ((), (3, 12, 10), (4, 12)):
        with pytest.raises(UsageError, match="--input-shape"):
            load(str(path), input_shape=shape)


def test_operators_without_a_counterpart_are_named(tmp_path):
    grid = floats(2, 3, 3, 2)
    path = written(tmp_path, [node("GridSample", "x grid")], {"grid": grid}, shape=(2, 4, 12, 10))
    with pytest.raises(UsageError, match="GridSample"):
        load(str(path))
    path = written(tmp_path, [node("LRN", "x", size=3)], {})
    with pytest.raises(UsageError, match="LRN"):
        load(str(path))


def test_a_network_that_differs_from_its_file_is_refused(tmp_path, monkeypatch):
    path = written(tmp_path, [STEM, node("LeakyRelu", "c", alpha=0.25)], ARRAYS)
    wrong = lambda attributes, x: torch.nn.functional.leaky_relu(x, 0.2501)  # noqa: E731
    monkeypatch.setitem(FUNCTIONS, "LeakyRelu", wrong)
    with pytest.raises(
        CheckFailed, match=r"net\.onnx.* ONNX Runtime differs from PyTorch by .* is allowed; export"
    ) as error:
        load(str(path))
    assert error.value.exit_code == 3


def test_a_network_is_compared_output_by_output(tmp_path, monkeypatch):
    nodes = [STEM, node("LeakyRelu", "c", "l.eaky", alpha=0.25), node("Relu", "c", "r")]
    path = written(tmp_path, nodes, ARRAYS, outputs=("r", "l.eaky"))
    load(str(path))
    wrong = lambda attributes, x: torch.nn.functional.leaky_relu(x, 0.2501)  # noqa: E731
    monkeypatch.setitem(FUNCTIONS, "LeakyRelu", wrong)
    with pytest.raises(CheckFailed, match=r"in output 'l_eaky' where"):
        load(str(path))


def test_a_file_of_a_fixed_batch_and_one_without_finite_outputs_become_networks(tmp_path):
    load(str(written(tmp_path, [STEM], ARRAYS, shape=(3, 4, 12, 10), outputs=("c",))))
    load(str(written(tmp_path, [node("Log", "x")], ARRAYS)))


def test_norms_in_training_mode_are_refused_by_name(tmp_path):
    norm = [f"bn.{name}" for name in ("weight", "bias", "running_mean", "running_var")]
    arrays = {name: np.ones(4, np.float32) for name in norm}
    nodes = [node("BatchNormalization", f"x {' '.join(norm)}", "b", "m", "v", training_mode=1), node("Relu", "b")]
    with pytest.raises(UsageError, match=r"BatchNormalization \(output 'b'\) in training mode"):
        load(str(written(tmp_path, nodes, arrays)))


def test_a_second_output_that_is_read_and_a_weight_used_in_two_ways_are_named(tmp_path):
    nodes = [node("Dropout", "x", "d", "mask"), node("Cast", "mask", "m", to=1), node("Add", "d m")]
    with pytest.raises(UsageError, match="output 'mask' of operator Dropout is read"):
        load(str(written(tmp_path, nodes, {})))
    near, far = (
        node("Conv", "x stem.conv.weight", name, dilations=[n, n], pads=[n] * 4)
        for n, name in ((1, "near"), (2, "far"))
    )
    with pytest.raises(UsageError, match="operator Conv .*that another node uses in another way"):
        load(str(written(tmp_path, [near, far, node("Add", "near far")], ARRAYS)))


@pytest.fixture
def classifier(tmp_path):
    arrays = {
        "a.weight": floats(32, 4, 3, 3),
        **{f"n.{name}": floats(32) for name in ("weight", "bias", "mean")},
        "n.var": floats(32) ** 2 + 0.5,
        "b.weight": floats(64, 32, 3, 3),
        "fc": floats(64, 10),
    }
    nodes = [
        node("Conv", "x a.weight", "a", pads=[1] * 4),
        node("BatchNormalization", "a n.weight n.bias n.mean n.var", "n"),
        node("Relu", "n", "r"),
        node("Conv", "r b.weight", "b", strides=[2, 2]),
        node("Relu", "b", "s"),
        node("GlobalAveragePool", "s", "g"),
        node("Flatten", "g", "f"),
        node("MatMul", "f fc"),
    ]
    return written(tmp_path, nodes, arrays, opset=13)


def test_a_model_folder_is_pruned_saved_loaded_trained_and_exported(tmp_path, classifier):
    model = convert(str(classifier), sparsity=0.8)
    assert model.sparsity == pytest.approx(0.8, abs=1e-4)
    model.save(tmp_path / "m")
    loaded = dsr_tool.load(tmp_path / "m")
    assert all(torch.equal(one, loaded.module.state_dict()[name]) for name, one in model.module.state_dict().items())
    optimizer = torch.optim.SGD(loaded.module.parameters(), lr=0.1)
    keeper = dsr_tool.attach(loaded, optimizer, method="set", total_steps=10)
    loaded.module.train()
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(loaded.module(torch.from_numpy(X)), torch.tensor([1, 2])).backward()
        optimizer.step()
    del keeper
    loaded.module.eval()
    for name in ("m.dsr", "m.onnx"):
        assert export(loaded, tmp_path / name).passed
    # An archive goes back to PyTorch: the graph is part of its description.
    back = dsr_tool.load(tmp_path / "m.dsr")
    with torch.no_grad():
        assert torch.equal(back.module.eval()(torch.from_numpy(X)), loaded.module(torch.from_numpy(X)))


def test_zeros_that_are_there_can_be_kept(tmp_path):
    weight = np.where(RNG.random((64, 4, 3, 3)) < 0.2, floats(64, 4, 3, 3), 0).astype(np.float32)
    path = written(tmp_path, [node("Conv", "x w")], {"w": weight})
    model = convert(str(path), sparsity="keep")
    assert model.active_weights == np.count_nonzero(weight)


def test_an_archive_of_an_onnx_file_has_no_network(tmp_path, classifier):
    export_onnx(classifier, tmp_path / "a.dsr")
    with pytest.raises(UsageError, match="has no network in PyTorch; convert the ONNX"):
        dsr_tool.load(tmp_path / "a.dsr")


def test_missing_and_damaged_files_are_one_sentence(tmp_path):
    with pytest.raises(FileError, match="none.onnx"):
        convert(str(tmp_path / "none.onnx"), sparsity=0.5)
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(FormatError, match="text.onnx"):
        convert(str(tmp_path / "text.onnx"), sparsity=0.5)


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document.pop("onnx_graph"),
        lambda document: document.update(onnx_graph={"nodes": []}),
        lambda document: document.update(onnx_shapes={}),
        lambda document: document["onnx_shapes"].update({"b.weight": [1 << 40, 1 << 40, 3, 3]}),
        lambda document: document["onnx_shapes"].update({"b.weight": ["a"]}),
        lambda document: document["onnx_graph"]["nodes"][0].update(op="NoSuchOperator"),
        lambda document: document["onnx_graph"]["nodes"][0].update(inputs=["x", "nobody"]),
    ],
)
def test_damaged_descriptions_are_refused(tmp_path, classifier, change):
    import json

    convert(str(classifier), sparsity=0.5).save(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    change(config["model"]["conversion"])
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises((CheckFailed, FormatError, UsageError)) as caught:
        dsr_tool.load(tmp_path / "m")
    assert str(caught.value).count("\n") == 0
