"""The interpreter folds, frees and limits values, and refuses graphs that it cannot compute."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse

from dsr_tool.errors import FormatError, UsageError
from dsr_tool.graph.ir import Graph, Node, Value
from dsr_tool.runtime.reference.call import FUNCTIONS
from dsr_tool.runtime.reference.interpreter import Interpreter
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor

X = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)


def test_every_function_is_compared_with_onnxruntime():
    """Every operator is named in a file of tests that use the fixture `agree`, which asks ONNX Runtime."""
    others = [path for path in Path(__file__).parent.glob("test_*.py") if path != Path(__file__)]
    texts = [text for path in others if "(agree" in (text := path.read_text(encoding="utf-8"))]
    names = [name for name in FUNCTIONS if not any(f'"{name}"' in text for text in texts)]
    # ONNX Runtime has no Swish; tests/graph/test_operators.py compares it with x times its gate.
    assert names == ["Swish"]


def plan_of(*nodes: Node, constants=None, tensors=None, outputs=("y",)) -> Interpreter:
    tensors = tensors or {}
    graph = Graph(
        (Value("x", (None, 3, 8)),),
        tuple(Value(name, ()) for name in outputs),
        nodes,
        constants or {},
        tuple(tensors),
        20,
    )
    graph.check()
    return Interpreter(graph, tensors)


def sparse(shape: tuple[int, ...], density: float = 0.1) -> SparseTensor:
    rng = np.random.default_rng(1)
    mask = Mask.from_bool(rng.random(shape) < density)
    return SparseTensor(mask, rng.standard_normal(mask.active).astype(np.float32))


def test_values_of_weights_alone_are_computed_once(monkeypatch):
    weight = sparse((20, 8))
    nodes = (
        Node("Transpose", ("w",), ("t",), {"perm": (1, 0)}),
        Node("Slice", ("t", "starts", "ends", "axes"), ("s",)),
        Node("MatMul", ("x", "s"), ("y",)),
    )
    constants = {name: np.array([n], np.int64) for name, n in (("starts", 5), ("ends", 15), ("axes", 1))}
    matrices = []
    csr_array = scipy.sparse.csr_array
    monkeypatch.setattr(scipy.sparse, "csr_array", lambda *a, **k: matrices.append(csr_array(*a, **k)) or matrices[-1])
    plan = plan_of(*nodes, constants=constants, tensors={"w": weight})
    assert [matrix.shape for matrix in matrices] == [(10, 8)], "the slice of a sparse weight multiplies as CSR"
    np.testing.assert_allclose(plan.run(X)[0], X @ weight.to_dense().T[:, 5:15], rtol=1e-5, atol=1e-5)
    assert len(matrices) == 1


def test_values_are_freed_after_their_last_use():
    x = np.zeros((1 << 18,), np.float32)
    nodes = [Node("Neg", (f"v{i}" if i else "x",), (f"v{i + 1}",)) for i in range(20)]
    plan = plan_of(*nodes, Node("Add", ("v20", "x"), ("y",)))
    tracemalloc.start()
    plan.run(x)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3.5 * x.nbytes


def test_runs_do_not_change_the_input_or_each_other():
    plan = plan_of(Node("Relu", ("x",), ("r",)), Node("Add", ("r", "x"), ("y",)))
    before = X.copy()
    np.testing.assert_array_equal(plan.run(X)[0], plan.run(X)[0])
    np.testing.assert_array_equal(X, before)


def test_an_output_that_cannot_be_computed_is_refused():
    nodes = (Node("Neg", ("x",), ("y",)), Node("Unheard", ("x",), ("z",)))
    with pytest.raises(UsageError, match="Unheard.*is not known"):
        plan_of(*nodes, outputs=("y", "z"))
    assert len(plan_of(*nodes).run(X)) == 1


def test_an_output_that_no_input_reaches_is_constant():
    plan = plan_of(Node("Neg", ("c",), ("y",)), constants={"c": np.ones(3, np.float32)})
    np.testing.assert_array_equal(plan.run(X)[0], -np.ones(3))


def test_infinities_and_nan_pass_without_a_warning():
    constants = {"c": np.array([-1.0], np.float32)}
    plan = plan_of(Node("Sqrt", ("c",), ("s",)), Node("Div", ("x", "s"), ("y",)), constants=constants)
    assert np.isnan(plan.run(X)[0]).all()
    plan = plan_of(Node("Sub", ("x", "x"), ("z",)), Node("Div", ("x", "z"), ("y",)))
    assert np.isinf(plan.run(X)[0]).all()


def test_unused_outputs_of_a_split_may_have_no_name():
    plan = plan_of(Node("Split", ("x",), ("", "y", "z"), {"axis": 1, "num_outputs": 3}))
    np.testing.assert_array_equal(plan.run(X)[0], X[:, 1:2])


def test_attributes_that_change_no_value_are_accepted():
    plan = plan_of(Node("MaxPool", ("x",), ("y",), {"kernel_shape": (2,), "storage_order": 0}))
    assert plan.run(X)[0].shape == (2, 3, 7)


def test_an_unknown_operator_is_named_in_the_error():
    with pytest.raises(UsageError, match=r"operator Unheard \(output 'y'\) is not known"):
        plan_of(Node("Unheard", ("x",), ("y",)))


def test_old_operator_sets_are_refused():
    graph = Graph((Value("x", ()),), (Value("y", ()),), (Node("Neg", ("x",), ("y",)),), {}, (), 13)
    with pytest.raises(UsageError, match="operator set 13"):
        Interpreter(graph, {})


def test_a_second_output_that_is_read_is_refused():
    nodes = (Node("MaxPool", ("x",), ("p", "i"), {"kernel_shape": (2,)}), Node("Neg", ("i",), ("y",)))
    with pytest.raises(UsageError, match="output 'i' of operator MaxPool is read, but only its first output"):
        plan_of(*nodes)


def test_an_unsupported_form_of_an_operator_is_refused():
    with pytest.raises(UsageError, match="SAME_UPPER"):
        plan_of(Node("MaxPool", ("x",), ("y",), {"kernel_shape": (2,), "auto_pad": "SAME_UPPER"})).run(X)


@pytest.mark.parametrize(
    "node",
    [
        Node("Conv", ("x", "w"), ("y",)),
        Node("Conv", ("x", "w"), ("y",), {"novel": 1}),
        Node("MatMul", ("x", "w"), ("y",)),
        Node("Gemm", ("x", "w"), ("y",), {"transB": 1}),
        Node("Add", ("x", "w"), ("y",)),
        Node("Neg", ("x",), ("y",), {"novel": 1}),
        Node("Concat", ("x", "w"), ("y",)),
        Node("BatchNormalization", ("x", "w", "w", "w", "w"), ("y",)),
        Node("MaxPool", ("x",), ("y",), {"kernel_shape": (0,)}),
        Node("MaxPool", ("x",), ("y",), {"kernel_shape": (1 << 20,), "pads": (1 << 19, 1 << 19)}),
    ],
)
def test_invalid_graphs_give_an_error_of_one_line(node):
    with pytest.raises(FormatError, match=f"operator {node.op} .*cannot be computed.*does not fit"):
        plan_of(node, tensors={"w": sparse((5, 7, 3))}).run(X)


@pytest.mark.parametrize(
    ("op", "inputs", "problem"),
    [
        ("Conv", (), "has 0 inputs, expected 2 or 3"),
        ("Conv", ("x", ""), "has no input 1"),
        ("Flatten", (), "has 0 inputs, expected 1"),
        ("Neg", ("x", "c"), "has 2 inputs, expected 1"),
        ("Add", ("x", "c", "c"), "has 3 inputs, expected 2"),  # numpy would write into a third one
        ("Where", ("", "x", "x"), "has no input 0"),
        ("Concat", (), "has 0 inputs, expected 1 or more"),
        ("Concat", ("x", ""), "has no input 1"),
        ("Slice", ("x", "c"), "has 2 inputs, expected 3 to 5"),
        ("Slice", ("x", "", "c"), "has no input 1"),
    ],
)
def test_a_wrong_number_of_inputs_is_refused(op, inputs, problem):
    with pytest.raises(FormatError, match=rf"operator {op} \(output 'y'\) {problem}; the graph is invalid"):
        plan_of(Node(op, inputs, ("y",)), constants={"c": np.ones(8, np.float32)})


@pytest.mark.parametrize(
    "nodes",
    [
        [Node("ConstantOfShape", ("n",), ("y",))],
        [Node("Range", ("zero", "n0", "one"), ("y",))],
        [Node("Expand", ("x", "far"), ("y",))],
        [Node("Pad", ("x", "pads"), ("y",))],
        [Node("Resize", ("x", "", "scales"), ("y",), {"mode": "linear"})],
        [Node("Split", ("x",), ("y",), {"num_outputs": 1 << 60})],
        [Node("MaxPool", ("x",), ("y",), {"kernel_shape": (2,), "pads": (1 << 30, 0)})],
        [Node("AveragePool", ("x",), ("y",), {"kernel_shape": (2,), "pads": (1 << 30, 0)})],
        [Node("Conv", ("x", "w"), ("y",), {"pads": (1 << 30, 0)})],
        [
            Node("Flatten", ("x",), ("f",), {"axis": 0}),
            *(Node("Concat", (f"f{i or ''}",) * 32, (f"f{i + 1}",), {"axis": 0}) for i in range(6)),
            Node("Neg", ("f6",), ("y",)),
        ],
        [
            Node("Reshape", ("x", "column"), ("c",)),
            Node("Reshape", ("x", "row"), ("r",)),
            *(
                node
                for i in range(4)
                for node in (
                    Node("MatMul", (f"c{i or ''}", f"r{i or ''}"), (f"m{i}",)),
                    Node("Reshape", (f"m{i}", "column"), (f"c{i + 1}",)),
                    Node("Reshape", (f"m{i}", "row"), (f"r{i + 1}",)),
                )
            ),
            Node("Add", ("c4", "r4"), ("y",)),
        ],
        [
            Node("Reshape", ("x", "row"), ("r",)),
            Node("Einsum", ("r",) * 6, ("y",), {"equation": "za,zb,zc,zd,ze,zf->abcdef"}),
        ],
        [Node("Gather", ("x", "many"), ("g",)), Node("Gather", ("g", "many"), ("y",), {"axis": 1})],
    ],
    ids=lambda nodes: nodes[-1].op,
)
@pytest.mark.parametrize("folded", [False, True])
def test_values_over_the_memory_limit_are_refused_before_they_are_allocated(nodes, folded):
    constants = {
        "n": np.array([1 << 30], np.int64),
        "n0": np.array(1 << 40, np.int64),
        "zero": np.array(0, np.int64),
        "one": np.array(1, np.int64),
        "far": np.array([1 << 30, 2, 3, 8], np.int64),
        "pads": np.array([0, 0, 0, 1 << 30, 0, 0], np.int64),
        "scales": np.array([1, 1, 1e9], np.float32),
        "row": np.array([1, -1], np.int64),
        "column": np.array([-1, 1], np.int64),
        "many": np.zeros(1 << 14, np.int64),
    }
    if folded:
        constants["k"] = X
        nodes = [
            Node(node.op, tuple("k" if name == "x" else name for name in node.inputs), node.outputs, node.attributes)
            for node in nodes
        ]
    tracemalloc.start()
    with pytest.raises(FormatError, match="bytes, over this graph.s limit of"):
        plan_of(*nodes, constants=constants, tensors={"w": sparse((4, 3, 3))}).run(X)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 600 << 20


def test_freed_values_no_longer_count_toward_the_memory_limit():
    x = np.zeros(1 << 20, np.float32)
    nodes = [Node("Neg", (f"v{i}" if i else "x",), (f"v{i + 1}",)) for i in range(100)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dsr_tool.graph.limits.FREE_BYTES", 9 << 20)
        patch.setattr("dsr_tool.graph.limits.MAX_HELD_RATIO", 0)
        assert plan_of(*nodes[:-1], Node("Neg", ("v99",), ("y",))).run(x)[0].shape == x.shape
        with pytest.raises(FormatError, match="over this graph.s limit"):
            plan_of(*nodes[:2], Node("Max", ("v1", "v2", "x"), ("y",))).run(x)


def test_a_slice_of_a_weight_does_not_keep_the_weight_alive():
    weight = SparseTensor(Mask.full((64, 1000)), np.ones(64_000, np.float32))
    nodes = [Node("Gather", ("w", "i"), (f"p{i}",)) for i in range(40)]
    sums = [Node("Add", ("x" if i == 0 else f"s{i - 1}", f"q{i}"), (f"s{i}" if i < 39 else "y",)) for i in range(40)]
    parts = [Node("Slice", (f"p{i}", "begin", "end"), (f"q{i}",)) for i in range(40)]
    constants = {"i": np.array(3), "begin": np.array([0]), "end": np.array([8])}
    tracemalloc.start()
    try:
        plan = plan_of(*nodes, *parts, *sums, constants=constants, tensors={"w": weight})
        assert tracemalloc.get_traced_memory()[0] < 2_000_000
    finally:
        tracemalloc.stop()
    np.testing.assert_allclose(plan.run(X)[0], X + 40, rtol=1e-6)


def test_changing_a_result_does_not_change_the_next_one():
    weight = SparseTensor(Mask.full((3, 8)), np.ones(24, np.float32))
    plan = plan_of(Node("Gather", ("w", "i"), ("y",)), constants={"i": np.array(0)}, tensors={"w": weight})
    first = plan.run(X)[0]
    first *= 0
    np.testing.assert_array_equal(plan.run(X)[0], np.ones(8))
