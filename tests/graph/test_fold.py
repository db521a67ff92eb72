from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from dsr_tool.graph.fold import fold_norms
from dsr_tool.graph.ir import Graph, Node, Value
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor

NORM = ("n.weight", "n.bias", "n.running_mean", "n.running_var")


def full(array: np.ndarray) -> SparseTensor:
    return SparseTensor.from_dense(array, Mask.from_bool(np.ones(array.shape, bool)))


def sparse(rng: np.random.Generator, shape: tuple[int, ...], density: float) -> SparseTensor:
    mask = Mask.from_bool(rng.random(shape) < density)
    return SparseTensor(mask, rng.standard_normal(mask.active).astype(np.float32))


def norm_tensors(rng: np.random.Generator, channels: int) -> dict[str, SparseTensor]:
    return {name: full(rng.uniform(0.2, 2, channels).astype(np.float32)) for name in NORM}


def graph_of(*nodes: Node, parameters: dict[str, SparseTensor], constants=None, outputs=("y",)) -> Graph:
    graph = Graph(
        (Value("x", (None, 4, 5, 5)),),
        tuple(Value(name, (None, 6, None, None)) for name in outputs),
        nodes,
        constants or {},
        tuple(parameters),
        20,
    )
    graph.check()
    return graph


def conv(source: str = "x", result: str = "c", weight: str = "c.weight", *bias: str, **attributes) -> Node:
    return Node("Conv", (source, weight, *bias), (result,), attributes)


def norm(source: str = "c", result: str = "y", **attributes) -> Node:
    return Node("BatchNormalization", (source, *NORM), (result,), attributes)


def ops(graph: Graph) -> list[str]:
    graph.check()
    return [node.op for node in graph]


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 2**32),
    st.sampled_from((0.0, 0.1, 0.5, 1.0)),
    st.sampled_from((1, 2)),
    st.sampled_from((None, "c.bias", "constant")),
    st.sampled_from((1e-5, 1e-3)),
)
def test_folded_convolution_equals_both_layers(seed, density, group, bias, epsilon):
    rng = np.random.default_rng(seed)
    tensors = {"c.weight": sparse(rng, (6, 4 // group, 3, 3), density), **norm_tensors(rng, 6)}
    given_bias = rng.standard_normal(6).astype(np.float32)
    if bias == "c.bias":
        tensors[bias] = full(given_bias)
    constants = {bias: given_bias} if bias == "constant" else {}
    nodes = (conv("x", "c", "c.weight", *filter(None, [bias]), group=group), norm(epsilon=epsilon))
    graph, folded = fold_norms(graph_of(*nodes, parameters=tensors, constants=constants), tensors)

    assert ops(graph) == ["Conv"]
    assert graph.nodes[0].outputs == ("y",)
    assert graph.parameters == tuple(folded) == ("c.weight", "c.bias")
    assert not graph.constants
    np.testing.assert_array_equal(folded["c.weight"].mask.positions, tensors["c.weight"].mask.positions)
    assert folded["c.weight"].values.dtype == folded["c.bias"].values.dtype == np.float32

    x = torch.from_numpy(rng.standard_normal((2, 4, 5, 5)))

    def double(tensor: SparseTensor) -> torch.Tensor:
        return torch.from_numpy(tensor.to_dense().astype(np.float64))

    old = torch.from_numpy(given_bias.astype(np.float64)) if bias else None
    both = functional.conv2d(x, double(tensors["c.weight"]), old, groups=group)
    gamma, beta, mean, variance = (double(tensors[name]) for name in NORM)
    both = functional.batch_norm(both, mean, variance, gamma, beta, eps=epsilon)
    one = functional.conv2d(x, double(folded["c.weight"]), double(folded["c.bias"]), groups=group)
    torch.testing.assert_close(one, both, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bias", [None, "c.bias"])
def test_a_folded_linear_layer_equals_both_layers(bias):
    rng = np.random.default_rng(0)
    tensors = {"c.weight": sparse(rng, (6, 9), 0.5), **norm_tensors(rng, 6)}
    if bias:
        tensors[bias] = full(rng.standard_normal(6).astype(np.float32))
    layer = Node("Gemm", ("x", "c.weight", *filter(None, [bias])), ("c",), {"transB": 1})
    graph, folded = fold_norms(graph_of(layer, norm(), parameters=tensors), tensors)
    assert ops(graph) == ["Gemm"] and graph.parameters == tuple(folded) == ("c.weight", "c.bias")
    np.testing.assert_array_equal(folded["c.weight"].mask.positions, tensors["c.weight"].mask.positions)
    x = rng.standard_normal((3, 9)).astype(np.float32)
    weight, scale, shift, mean, variance = (tensors[name].to_dense() for name in ("c.weight", *NORM))
    old = tensors[bias].to_dense() if bias else 0
    both = (x @ weight.T + old - mean) / np.sqrt(variance + 1e-5) * scale + shift
    one = x @ folded["c.weight"].to_dense().T + folded["c.bias"].to_dense()
    np.testing.assert_allclose(one, both, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attributes", [{}, {"transB": 1, "alpha": 2.0}, {"transB": 1, "transA": 1}])
def test_a_norm_behind_another_product_stays(attributes):
    rng = np.random.default_rng(0)
    tensors = {"c.weight": sparse(rng, (6, 6), 0.5), **norm_tensors(rng, 6)}
    layer = Node("Gemm", ("x", "c.weight"), ("c",), attributes)
    graph, _ = fold_norms(graph_of(layer, norm(), parameters=tensors), tensors)
    assert ops(graph) == ["Gemm", "BatchNormalization"]


def test_folding_does_not_change_its_arguments():
    rng = np.random.default_rng(0)
    tensors = {"c.weight": sparse(rng, (6, 4, 1, 1), 0.5), **norm_tensors(rng, 6)}
    graph, values = graph_of(conv(), norm(), parameters=tensors), tensors["c.weight"].values.copy()
    text = graph.to_json()
    fold_norms(graph, tensors)
    assert graph.to_json() == text
    np.testing.assert_array_equal(tensors["c.weight"].values, values)


def test_a_weight_scaled_to_zero_stays_active():
    rng = np.random.default_rng(0)
    tensors = {"c.weight": sparse(rng, (6, 4, 1, 1), 0.5), **norm_tensors(rng, 6)}
    tensors["n.weight"] = full(np.zeros(6, np.float32))
    _, folded = fold_norms(graph_of(conv(), norm(), parameters=tensors), tensors)
    assert folded["c.weight"].mask.active == tensors["c.weight"].mask.active > 0
    assert not folded["c.weight"].values.any()


def test_float16_weights_are_rounded_once_to_float32():
    rng = np.random.default_rng(0)
    tensors = {"c.weight": sparse(rng, (6, 4, 1, 1), 0.5), **norm_tensors(rng, 6)}
    tensors = {name: SparseTensor(t.mask, t.values.astype(np.float16)) for name, t in tensors.items()}
    _, folded = fold_norms(graph_of(conv(), norm(), parameters=tensors), tensors)
    gamma, variance = (tensors[name].values.astype(np.float64) for name in (NORM[0], NORM[3]))
    factor = (gamma / np.sqrt(variance + 1e-5))[tensors["c.weight"].mask.positions // 4]
    np.testing.assert_array_equal(
        folded["c.weight"].values, (tensors["c.weight"].values * factor).astype(np.float32), strict=True
    )


def test_two_norms_in_a_row_are_both_folded():
    rng = np.random.default_rng(0)
    tensors = {"c.weight": sparse(rng, (6, 4, 1, 1), 0.5), **norm_tensors(rng, 6)}
    graph, folded = fold_norms(graph_of(conv(), norm("c", "d"), norm("d", "y"), parameters=tensors), tensors)
    assert ops(graph) == ["Conv"]
    assert list(folded) == ["c.weight", "c.bias"]


@pytest.mark.parametrize(
    ("nodes", "outputs"),
    [
        pytest.param([norm("x", "y")], ["y"], id="no convolution"),
        pytest.param([conv(), Node("Relu", ("c",), ("r",)), norm("r")], ["y"], id="something between"),
        pytest.param([conv(), norm("c", "b"), Node("Add", ("b", "c"), ("y",))], ["y"], id="output has two readers"),
        pytest.param([conv(), norm()], ["y", "c"], id="output is returned"),
        pytest.param([conv(), conv("x", "d"), norm(), norm("d", "z")], ["y", "z"], id="weight has two readers"),
        pytest.param([conv(), Node("BatchNormalization", ("c", *NORM[:3], ""), ("y",))], ["y"], id="no variance"),
        pytest.param([conv(), Node("BatchNormalization", ("c", *NORM[:3], "s"), ("y",))], ["y"], id="variance of one"),
        pytest.param([Node("Conv", ("x",), ("c",)), norm()], ["y"], id="no weight"),
        pytest.param([conv(), norm(training_mode=1)], ["y"], id="training"),
        pytest.param([conv(weight="fixed"), norm()], ["y"], id="weight is a constant"),
        pytest.param([Node("Neg", ("c.weight",), ("w",)), conv(weight="w"), norm()], ["y"], id="weight is computed"),
    ],
)
def test_a_norm_that_cannot_be_folded_stays(nodes, outputs):
    rng = np.random.default_rng(0)
    tensors = {"c.weight": sparse(rng, (6, 4, 1, 1), 0.5), **norm_tensors(rng, 6)}
    constants = {"fixed": np.ones((6, 4, 1, 1), np.float32), "s": np.ones(1, np.float32)}
    before = graph_of(*nodes, parameters=tensors, constants=constants, outputs=outputs)
    graph, folded = fold_norms(before, tensors)
    assert ops(graph) == [node.op for node in nodes]
    assert all(folded[name] is tensors[name] for name in folded)


def test_only_tensors_that_the_graph_reads_are_returned():
    rng = np.random.default_rng(0)
    tensors = {
        "n.num_batches_tracked": full(np.zeros((), np.int64)),
        "c.weight": sparse(rng, (6, 4, 1, 1), 0.5),
        **norm_tensors(rng, 6),
        "scale": full(np.ones(1, np.float32)),
    }
    parameters = {name: tensor for name, tensor in tensors.items() if name != "n.num_batches_tracked"}
    nodes = (conv(), norm("c", "b"), Node("Mul", ("b", "scale"), ("y",)))
    _, folded = fold_norms(graph_of(*nodes, parameters=parameters), tensors)
    assert set(folded) == {"c.weight", "c.bias", "scale"}
    assert folded["scale"] is tensors["scale"]


def test_new_biases_have_new_names():
    rng = np.random.default_rng(0)
    tensors = {"c.weight": sparse(rng, (6, 4, 1, 1), 0.5), **norm_tensors(rng, 6)}
    tensors |= {"c.bias": full(np.ones((1, 1), np.float32)), "c.bias_1": full(np.ones(1, np.float32))}
    nodes = (conv(), norm("c", "b"), Node("Add", ("b", "c.bias"), ("y",)))
    graph, folded = fold_norms(graph_of(*nodes, parameters=tensors), tensors)
    assert graph.nodes[0].inputs == ("x", "c.weight", "c.bias_2")
    assert set(folded) == {"c.weight", "c.bias", "c.bias_2"}
    assert folded["c.bias"] is tensors["c.bias"]


def test_a_bias_with_another_reader_keeps_its_values():
    rng = np.random.default_rng(0)
    tensors = {"c.weight": sparse(rng, (6, 4, 1, 1), 0.5), **norm_tensors(rng, 6)}
    tensors["shared"] = full(np.ones(6, np.float32))
    nodes = (conv("x", "c", "c.weight", "shared"), norm("c", "b"), norm("b", "d"), conv("x", "e", "e.weight", "shared"))
    tensors["e.weight"] = sparse(rng, (6, 4, 1, 1), 0.5)
    graph, folded = fold_norms(graph_of(*nodes, Node("Add", ("d", "e"), ("y",)), parameters=tensors), tensors)
    assert graph.nodes[0].inputs == ("x", "c.weight", "c.bias")
    assert folded["shared"] is tensors["shared"]


def test_a_negative_variance_gives_nan_without_a_warning():
    rng = np.random.default_rng(0)
    tensors = {"c.weight": sparse(rng, (6, 4, 3, 3), 0.5), **norm_tensors(rng, 6)}
    tensors["n.running_var"] = full(np.array([-1, 0, 1, 1, 1, 1], np.float32))
    folded, new = fold_norms(graph_of(conv(), norm(epsilon=0.0), parameters=tensors), tensors)
    assert ops(folded) == ["Conv"]
    assert np.isnan(new["c.bias"].to_dense()[0])


def test_a_norm_with_an_invalid_epsilon_stays():
    rng = np.random.default_rng(0)
    tensors = {"c.weight": sparse(rng, (6, 4, 3, 3), 0.5), **norm_tensors(rng, 6)}
    folded, _ = fold_norms(graph_of(conv(), norm(epsilon="small"), parameters=tensors), tensors)
    assert ops(folded) == ["Conv", "BatchNormalization"]
