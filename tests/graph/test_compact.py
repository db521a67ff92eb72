from __future__ import annotations

import itertools

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsr_tool.graph.compact.rewrite import Compacted, Removed, compact
from dsr_tool.graph.fold import fold_norms
from dsr_tool.graph.ir import Graph, Node, Value
from dsr_tool.runtime.reference.interpreter import Interpreter
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor
from exporters.onnx.write import to_onnx

SIZE = 9


class Builder:
    """Writes a graph node by node; `x` is its input (batch, 4, 9, 9)."""

    def __init__(self, seed: int = 0, dead: float = 0.0) -> None:
        self.rng, self.dead = np.random.default_rng(seed), dead
        self.nodes: list[Node] = []
        self.tensors: dict[str, SparseTensor] = {}
        self.constants: dict[str, np.ndarray] = {}
        self.channels = {"x": 4}
        self._count = itertools.count()

    def add(self, op: str, *inputs: str, channels: int = 0, **attributes) -> str:
        name = f"v{next(self._count)}"
        self.nodes.append(Node(op, inputs, (name,), attributes))
        self.channels[name] = channels or self.channels.get(inputs[0], 0)
        return name

    def constant(self, array) -> str:
        name = f"k{next(self._count)}"
        self.constants[name] = np.asarray(array)
        return name

    def weight(self, array: np.ndarray, name: str = "") -> str:
        name = name or f"p{next(self._count)}"
        array = array.astype(np.float32)
        mask = array != 0
        if array.ndim > 1:
            mask |= self.rng.random(array.shape) < 0.1  # active weights may be zero
        self.tensors[name] = SparseTensor.from_dense(array, Mask.from_bool(mask if array.ndim > 1 else mask | True))
        return name

    def random(self, *shape: int) -> np.ndarray:
        """A weight (outputs, inputs, ...) with dead filters and dead inputs."""
        array = self.rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        array *= self.rng.random(shape) < 0.7
        for axis in (0, 1):
            size = [1] * len(shape)
            size[axis] = shape[axis]
            array *= (self.rng.random(size) >= self.dead) if shape[axis] > 1 else 1
        return array

    def bias(self, count: int) -> str:
        return self.weight(self.rng.normal(0, 1, count) * (self.rng.random(count) < 0.8))

    def conv(self, x: str, filters: int, *, kernel=1, pad=0, group=1, bias=True) -> str:
        weight = self.weight(self.random(filters, self.channels[x] // group, kernel, kernel))
        extra = (self.bias(filters),) if bias else ()
        return self.add("Conv", x, weight, *extra, channels=filters, group=group, pads=(pad,) * 4)

    def linear(self, x: str, features: int, outputs: int) -> str:
        return self.add("Gemm", x, self.weight(self.random(outputs, features)), self.bias(outputs), transB=1)

    def norm(self, x: str) -> str:
        count = self.channels[x]
        parts = [self.rng.normal(0, 1, count), self.rng.normal(0, 1, count), self.rng.normal(0, 1, count)]
        return self.add("BatchNormalization", x, *map(self.weight, (*parts, self.rng.uniform(0.5, 2, count))))

    def flat(self, x: str, features: int) -> str:
        shape = self.add("Shape", "x", channels=1, start=0, end=1)
        batch = self.add("Unsqueeze", self.add("Squeeze", shape), self.constant(np.zeros(1, np.int64)))
        return self.add("Reshape", x, self.add("Concat", batch, self.constant(np.array([features])), axis=0))

    def graph(self, output: str) -> Graph:
        nodes = [n if n.outputs != (output,) else Node(n.op, n.inputs, ("y",), n.attributes) for n in self.nodes]
        graph = Graph(
            (Value("x", (None, 4, SIZE, SIZE)),),
            (Value("y", (None, None)),),
            tuple(nodes),
            self.constants,
            tuple(self.tensors),
            20,
        )
        graph.check()
        return graph


def onnxruntime_runs(graph: Graph, tensors, x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    model = to_onnx(graph, tensors, encoding="dense").SerializeToString()
    return onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"]).run(None, {"x": x})[0]


def compacted(builder: Builder, output: str) -> tuple[Graph, dict[str, SparseTensor], Compacted]:
    """Compact a graph and compare what it computes before and after, in both runtimes."""
    graph, tensors = fold_norms(builder.graph(output), builder.tensors)
    text, values = graph.to_json(), {name: tensor.to_dense().copy() for name, tensor in tensors.items()}
    result = compact(graph, tensors)
    result.graph.check()
    assert graph.to_json() == text
    assert all(np.array_equal(tensors[name].to_dense(), values[name], equal_nan=True) for name in tensors)
    assert tuple(result.tensors) == result.graph.parameters
    x = np.random.default_rng(1).standard_normal((3, 4, SIZE, SIZE)).astype(np.float32)
    before = onnxruntime_runs(graph, tensors, x)
    scale = float(np.abs(before).max()) + 1e-30
    for run in (onnxruntime_runs(result.graph, result.tensors, x), *Interpreter(result.graph, result.tensors).run(x)):
        assert run.shape == before.shape
        np.testing.assert_allclose(run, before, rtol=0, atol=1e-5 * scale)
    return graph, tensors, result


def removed(result: Compacted) -> dict[str, tuple[tuple[int, int], tuple[int, int]]]:
    return {layer.weight: (layer.filters, layer.inputs) for layer in result.removed}


# --- random networks -------------------------------------------------------------------------------------


def excited(b: Builder, x: str) -> str:
    """Squeeze and excitation."""
    pooled = b.add("ReduceMean", x, b.constant(np.array([2, 3])), keepdims=1)
    hidden = b.add("Relu", b.conv(pooled, 3))
    return b.add("Mul", x, b.add("HardSigmoid", b.conv(hidden, b.channels[x])))


def residual(b: Builder, x: str) -> str:
    y = b.add("Relu", b.conv(x, 6))
    y = b.conv(b.add("Relu", b.conv(y, 6, kernel=3, pad=1)), b.channels[x])
    return b.add("Relu", b.add("Add", y, x))


def dense_block(b: Builder, x: str) -> str:
    y = b.conv(b.add("Relu", b.norm(x)), 3, kernel=3, pad=1)
    return b.add("Concat", x, y, axis=1, channels=b.channels[x] + 3)


def halves(b: Builder, x: str) -> str:
    count = b.channels[x]
    if count < 2:
        return x
    first, second = count // 2, count - count // 2
    b.nodes.append(Node("Split", (x, b.constant(np.array([first, second]))), (f"{x}a", f"{x}b"), {"axis": 1}))
    b.channels |= {f"{x}a": first, f"{x}b": second}
    return b.add("Concat", b.conv(f"{x}b", first), f"{x}a", axis=1, channels=2 * first)


def scaled(b: Builder, x: str) -> str:
    shape = (1, b.channels[x], 1, 1)
    y = b.add("Mul", x, b.constant(b.rng.normal(0, 1, shape).astype(np.float32)))
    return b.add("Sub", y, b.weight(b.rng.normal(0, 1, shape[1:])))


def channelwise(b: Builder, x: str) -> str:
    return b.conv(x, b.channels[x] * int(b.rng.integers(1, 3)), kernel=3, pad=1, group=b.channels[x])


def grouped(b: Builder, x: str) -> str:
    return b.conv(x, 8, kernel=3, pad=1, group=2) if b.channels[x] % 2 == 0 else b.conv(x, 8)


PIECES = {
    "conv": lambda b, x: b.conv(x, 7),
    "without bias": lambda b, x: b.conv(x, 7, bias=False),
    "padded": lambda b, x: b.conv(x, 6, kernel=3, pad=1),
    "channelwise": channelwise,
    "channelwise 1x1": lambda b, x: b.conv(x, b.channels[x], group=b.channels[x]),
    "grouped": grouped,
    "grouped 1x1": lambda b, x: b.conv(b.conv(x, 6), 9, group=3),
    "residual": residual,
    "dense": dense_block,
    "excited": excited,
    "halves": halves,
    "scaled": scaled,
    "norm": lambda b, x: b.norm(x),
    "relu": lambda b, x: b.add("Relu", x),
    "hardswish": lambda b, x: b.add("HardSwish", x),
    "gelu": lambda b, x: b.add("Gelu", x),
    "clip": lambda b, x: b.add("Clip", x, b.constant(np.float32(0)), b.constant(np.float32(6))),
    "sigmoid": lambda b, x: b.add("Mul", x, b.add("Sigmoid", x)),
    "maxpool": lambda b, x: b.add("MaxPool", x, kernel_shape=(3, 3), strides=(1, 1), pads=(1, 1, 1, 1)),
    "averaged": lambda b, x: b.add("AveragePool", x, kernel_shape=(3, 3), pads=(1,) * 4, count_include_pad=1),
    "averaged within": lambda b, x: b.add("AveragePool", x, kernel_shape=(3, 3), pads=(1,) * 4, count_include_pad=0),
    "unknown": lambda b, x: b.add("Transpose", b.add("Transpose", x, perm=(0, 1, 3, 2)), perm=(0, 1, 3, 2)),
}


def head(b: Builder, x: str, flat: bool) -> str:
    if flat:
        y, features = b.flat(x, b.channels[x] * SIZE * SIZE), b.channels[x] * SIZE * SIZE
    else:
        y, features = b.add("ReduceMean", x, b.constant(np.array([-1, -2])), keepdims=0), b.channels[x]
    return b.linear(b.add("Relu", b.linear(y, features, 12)), 12, 5)


@settings(max_examples=120, deadline=None)
@given(
    st.integers(0, 2**32),
    st.lists(st.sampled_from(sorted(PIECES)), max_size=7),
    st.sampled_from((0.0, 0.3, 0.7, 1.0)),
    st.booleans(),
)
def test_a_random_network_computes_the_same_after_compaction(seed, pieces, dead, flat):
    b = Builder(seed, dead)
    x = "x"
    for piece in pieces:
        x = PIECES[piece](b, x)
    _, tensors, result = compacted(b, head(b, x, flat))
    for name, tensor in tensors.items():
        if name in result.tensors and len(tensor.mask.shape) > 1:
            assert result.tensors[name].mask.active <= tensor.mask.active
    assert all(min(layer.filters[1], layer.inputs[1]) >= 1 for layer in result.removed)


# --- what exactly is removed -----------------------------------------------------------------------------


def dense(*shape: int, dead_filters=(), dead_inputs=()) -> np.ndarray:
    array = np.random.default_rng(0).normal(1, 0.1, shape)
    array[list(dead_filters)] = 0
    array[:, list(dead_inputs)] = 0
    return array


def chain(b: Builder, *, bias, kernel: int = 1, op: str = "Relu") -> str:
    """Two convolutions; of the 6 filters of the first, 1, 2 and 4 are dead."""
    first = b.add(
        "Conv", "x", b.weight(dense(6, 4, 1, 1, dead_filters=(1, 2, 4)), "a.weight"), b.weight(np.array(bias))
    )
    pads = (kernel // 2,) * 4
    second = b.add("Conv", b.add(op, first), b.weight(dense(5, 6, kernel, kernel), "b.weight"), pads=pads)
    return b.add("ReduceMean", second, b.constant(np.array([2, 3])), keepdims=0)


BIAS = (0.1, 2.0, -1.0, 0.3, 3.0, 0.2)


def test_a_filter_without_weights_is_removed_and_its_constant_moves_to_a_bias():
    b = Builder()
    _, _, result = compacted(b, chain(b, bias=BIAS))
    assert result.removed == (Removed("a.weight", (6, 3), (4, 4)), Removed("b.weight", (5, 5), (6, 3)))
    assert result.tensors["b.weight"].mask.shape == (5, 3, 1, 1)
    weight = dense(5, 6, 1, 1)[:, :, 0, 0].astype(np.float32).astype(np.float64)
    wanted = weight[:, [1, 4]] @ np.array([2.0, 3.0])  # the third has a constant of 0 behind the Relu
    np.testing.assert_allclose(result.tensors["b.bias"].values, wanted, rtol=1e-6)


def test_behind_zero_padding_one_constant_channel_replaces_all_others():
    b = Builder()
    _, _, result = compacted(b, chain(b, bias=BIAS, kernel=3))
    assert removed(result) == {"a.weight": ((6, 4), (4, 4)), "b.weight": ((5, 5), (6, 4))}
    weight = result.tensors["b.weight"].to_dense()
    old = dense(5, 6, 3, 3).astype(np.float32)
    np.testing.assert_allclose(weight[:, 2], old[:, 4] + old[:, 1] * 2 / 3, rtol=1e-6)


def test_behind_zero_padding_constants_of_zero_are_all_removed():
    b = Builder()
    _, _, result = compacted(b, chain(b, bias=(0.1, -2.0, -1.0, 0.3, 0, 0.2), kernel=3))
    assert removed(result) == {"a.weight": ((6, 3), (4, 4)), "b.weight": ((5, 5), (6, 3))}


def test_a_filter_whose_output_nothing_reads_is_removed():
    b = Builder()
    first = b.add("Conv", "x", b.weight(dense(6, 4, 1, 1), "a.weight"))
    second = b.add("Conv", b.add("Sigmoid", first), b.weight(dense(5, 6, 1, 1, dead_inputs=(0, 3)), "b.weight"))
    _, _, result = compacted(b, b.add("ReduceMean", second, b.constant(np.array([2, 3])), keepdims=0))
    assert removed(result) == {"a.weight": ((6, 4), (4, 4)), "b.weight": ((5, 5), (6, 4))}


def test_a_weight_that_is_active_and_zero_counts_as_absent():
    b = Builder()
    output = chain(b, bias=BIAS)
    b.tensors["a.weight"] = SparseTensor.from_dense(b.tensors["a.weight"].to_dense(), Mask.full((6, 4, 1, 1)))
    _, _, result = compacted(b, output)
    assert removed(result)["a.weight"] == ((6, 3), (4, 4))
    assert result.tensors["a.weight"].mask.active == 12


def test_a_depthwise_convolution_loses_channels_and_groups():
    b = Builder()
    first = b.add("Conv", "x", b.weight(dense(6, 4, 1, 1, dead_filters=(1, 2)), "a.weight"), b.weight(-np.ones(6)))
    wise = b.weight(dense(6, 1, 3, 3, dead_filters=(4,)), "w.weight")
    second = b.add("Conv", b.add("Relu", first), wise, b.weight(np.ones(6)), group=6, pads=(1,) * 4)
    third = b.add("Conv", second, b.weight(dense(5, 6, 1, 1), "b.weight"))
    _, _, result = compacted(b, b.add("ReduceMean", third, b.constant(np.array([2, 3])), keepdims=0))
    assert removed(result) == {
        "a.weight": ((6, 3), (4, 4)),
        "w.weight": ((6, 3), (6, 3)),
        "b.weight": ((5, 5), (6, 3)),
    }
    assert [node.attributes.get("group") for node in result.graph if "w.weight" in node.inputs] == [3]


def test_a_sum_loses_the_channels_that_nothing_reads():
    b = Builder()
    stem = b.add("Conv", "x", b.weight(dense(6, 4, 1, 1), "stem.weight"))
    block = b.add("Conv", stem, b.weight(dense(6, 6, 1, 1, dead_inputs=(2, 5), dead_filters=(0,)), "block.weight"))
    last = b.add("Conv", b.add("Add", block, stem), b.weight(dense(5, 6, 1, 1, dead_inputs=(2, 5)), "last.weight"))
    _, _, result = compacted(b, b.add("ReduceMean", last, b.constant(np.array([2, 3])), keepdims=0))
    # The dead filter 0 stays: the other operand of the sum is alive there.
    assert removed(result) == {
        "stem.weight": ((6, 4), (4, 4)),
        "block.weight": ((6, 4), (6, 4)),
        "last.weight": ((5, 5), (6, 4)),
    }


def test_a_flattened_picture_loses_whole_channels():
    b = Builder()
    first = b.add("Conv", "x", b.weight(dense(6, 4, 1, 1, dead_filters=(1, 2, 4)), "a.weight"), b.weight(np.ones(6)))
    flat = b.flat(b.add("Relu", first), 6 * SIZE * SIZE)
    output = b.add("Gemm", flat, b.weight(dense(5, 6 * SIZE * SIZE), "b.weight"), transB=1)
    _, _, result = compacted(b, output)
    assert removed(result)["b.weight"] == ((5, 5), (6 * SIZE * SIZE, 3 * SIZE * SIZE))


@pytest.mark.parametrize("turned", [False, True])
def test_hidden_channels_of_a_linear_pair_are_removed(turned):
    b = Builder()
    hidden, out = dense(9, 6, dead_inputs=(1, 3)), dense(6, 5, dead_filters=(4,))

    def weight(array: np.ndarray, name: str) -> str:
        return b.add("Transpose", b.weight(array.T, name), perm=(1, 0)) if turned else b.weight(array, name)

    x = b.add("Add", b.add("MatMul", "x", weight(hidden, "a.weight")), b.weight(np.arange(6.0), "a.bias"))
    y = b.add("MatMul", b.add("Gelu", x), weight(out, "b.weight"))
    _, _, result = compacted(b, b.add("ReduceMean", y, b.constant(np.array([1, 2])), keepdims=0))
    # Channels 1 and 3 are constant behind the bias. The larger one stays: a product without a bias cannot hold it.
    found = removed(result)
    assert found == {"a.weight": ((6, 4), (9, 9)), "b.weight": ((5, 5), (6, 4))}
    np.testing.assert_array_equal(result.tensors["a.bias"].values, [0, 2, 3, 5])


def test_one_filter_stays_in_a_layer_without_weights():
    b = Builder()
    first = b.add("Conv", "x", b.weight(np.zeros((6, 4, 1, 1)), "a.weight"), b.weight(np.arange(6.0)))
    second = b.add("Conv", b.add("Relu", first), b.weight(dense(5, 6, 1, 1), "b.weight"))
    _, _, result = compacted(b, b.add("ReduceMean", second, b.constant(np.array([2, 3])), keepdims=0))
    assert removed(result) == {"a.weight": ((6, 1), (4, 4)), "b.weight": ((5, 5), (6, 1))}


def test_groups_keep_one_size():
    b = Builder()
    first = b.add("Conv", "x", b.weight(dense(8, 4, 1, 1, dead_filters=(0, 1, 2, 4)), "a.weight"))
    second = b.add("Conv", first, b.weight(dense(6, 4, 1, 1, dead_filters=(0, 4)), "g.weight"), group=2)
    third = b.add("Conv", second, b.weight(dense(5, 6, 1, 1), "b.weight"))
    _, _, result = compacted(b, b.add("ReduceMean", third, b.constant(np.array([2, 3])), keepdims=0))
    assert removed(result)["g.weight"] == ((6, 4), (8, 6))


def test_a_weight_that_two_layers_share_stays():
    b = Builder()
    shared = b.weight(dense(4, 4, 1, 1, dead_filters=(1,), dead_inputs=(2,)), "a.weight")
    y = b.add("Conv", b.add("Relu", b.add("Conv", "x", shared)), shared)
    _, tensors, result = compacted(b, b.add("ReduceMean", y, b.constant(np.array([2, 3])), keepdims=0))
    assert not result.removed
    assert result.tensors["a.weight"] is tensors["a.weight"]


@pytest.mark.parametrize(
    "reader",
    [
        lambda b, x: b.add("Softmax", x, axis=1),
        lambda b, x: b.add("Transpose", x, perm=(0, 2, 3, 1)),
        lambda b, x: b.add("Reshape", x, b.constant(np.array([0, 2, 3, SIZE, SIZE]))),
    ],
)
def test_an_operator_without_a_rule_keeps_all_channels_that_it_reads(reader):
    b = Builder()
    first = b.add("Conv", "x", b.weight(dense(6, 4, 1, 1, dead_filters=(1, 2)), "a.weight"))
    y = reader(b, first)
    _, _, result = compacted(b, b.add("ReduceMean", y, b.constant(np.array([1, 2])), keepdims=0))
    assert not result.removed


def test_compacting_twice_removes_nothing_more():
    b = Builder(3, 0.4)
    x = dense_block(b, residual(b, b.conv(excited(b, b.conv("x", 8)), 8, kernel=3, pad=1)))
    _, _, result = compacted(b, head(b, x, flat=False))
    assert result.removed
    assert not compact(result.graph, result.tensors).removed
