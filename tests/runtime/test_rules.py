"""Every lowering rule and every kernel is reached by a plan that has no fallback.

A rule that is removed, or that always declines, makes its case fail: `both` allows no fallback here. A rule or a kernel
that is added without a case fails too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from dsr_tool.graph.ir import Graph, Node, Value
from dsr_tool.runtime.compiler.machine import Machine
from dsr_tool.runtime.compiler.plan import Plan
from dsr_tool.runtime.compiler.program import KernelStep
from dsr_tool.runtime.compiler.rules import RULES
from dsr_tool.runtime.coverage import Coverage, Fallback, coverage_text
from dsr_tool.runtime.deploy.plan import PlanFile
from dsr_tool.runtime.deploy.writer import chosen_levels, plan_bytes
from dsr_tool.runtime.kernels.library import level, library
from dsr_tool.runtime.kernels.ops import Activation, Combination, Kind
from dsr_tool.runtime.reference.interpreter import Interpreter
from dsr_tool.runtime.session import decode
from dsr_tool.sparsity.config import ModelConfig
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor

pytestmark = pytest.mark.skipif(library() is None, reason="no kernels were built here")

IMAGE = (2, 4, 9, 9)
TOKENS = (1, 5, 6)


@dataclass(frozen=True)
class Case:
    """A small graph of which every node runs on a kernel.

    Attributes:
        name: the operator under test, with the form of it after a colon.
        nodes: its nodes; the first one reads `x`.
        shape: shape of the input.
        weights: shapes of its weights, by name; half of their entries are active.
        constants: arrays by name.
    """

    name: str
    nodes: tuple[Node, ...]
    shape: tuple[int, ...] = IMAGE
    weights: dict[str, tuple[int, ...]] = field(default_factory=dict)
    constants: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def operator(self) -> str:
        return self.name.partition(":")[0]

    def tensors(self) -> dict[str, SparseTensor]:
        rng = np.random.default_rng(0)
        tensors = {}
        for name, shape in self.weights.items():
            # Vectors are biases and scales, which have no zeros.
            mask = rng.random(shape) < (0.5 if len(shape) > 1 else 1)
            tensors[name] = SparseTensor(Mask.from_bool(mask), rng.standard_normal(int(mask.sum())).astype(np.float32))
        return tensors

    def input(self) -> np.ndarray:
        return np.random.default_rng(1).standard_normal(self.shape).astype(np.float32)

    def graph(self) -> Graph:
        output = Value(self.nodes[-1].outputs[0], ())
        return Graph((Value("x", self.shape),), (output,), self.nodes, self.constants, tuple(self.weights), 20)


@dataclass(frozen=True)
class CaseModel:
    """A case as an open file, which plan files are made from."""

    case: Case
    path: Path = Path("case")

    @property
    def config(self) -> ModelConfig:
        return ModelConfig("module", "Case")

    @property
    def graph(self) -> Graph:
        return self.case.graph()

    def tensor(self, name: str) -> SparseTensor:
        return self.case.tensors()[name]


def one(op: str, **attributes: object) -> tuple[Node, ...]:
    """A node that reads the input alone."""
    return (Node(op, ("x",), ("y",), attributes),)


def of_two(op: str) -> tuple[Node, ...]:
    """A node that reads two values which are computed by different nodes; the second is far from zero."""
    return (Node("Tanh", ("x",), ("a",)), Node("Sigmoid", ("x",), ("b",)), Node(op, ("a", "b"), ("y",)))


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(2).standard_normal(shape).astype(np.float32)


def heads(*after: Node) -> tuple[Node, ...]:
    """The queries `q` and keys `k` of two heads of attention, (batch, 2, 5, 4), from one linear layer on tokens."""
    return (
        Node("MatMul", ("x", "w"), ("a",)),
        Node("Reshape", ("a", "parts"), ("b",)),
        Node("Transpose", ("b",), ("c",), {"perm": (2, 0, 3, 1, 4)}),
        Node("Gather", ("c", "first"), ("q",)),
        Node("Gather", ("c", "second"), ("k",)),
        *after,
    )


HEADS = {"parts": ints(-1, 5, 2, 2, 4), "first": np.array(0), "second": np.array(1)}
WINDOWS = (
    Node("Conv", ("x", "w"), ("a",)),
    Node("Transpose", ("a",), ("b",), {"perm": (0, 2, 3, 1)}),
    Node("LayerNormalization", ("b", "s"), ("c",)),
    Node("Pad", ("c", "pads"), ("d",)),
    Node("Slice", ("d", "two", "far", "one"), ("e",)),
    Node("Slice", ("d", "zero", "two", "one"), ("f",)),
    Node("Concat", ("e", "f"), ("g",), {"axis": 1}),
    Node("Reshape", ("g", "cut"), ("h",)),
    Node("Transpose", ("h",), ("i",), {"perm": (0, 1, 3, 2, 4, 5)}),
)
"""Windows of 5 x 5 pixels of a rolled picture of 9 x 9, as Swin transformers make them."""
OF_WINDOWS = {
    "pads": ints(0, 0, 0, 0, 0, 1, 1, 0), "zero": ints(0), "one": ints(1), "two": ints(2), "far": ints(1 << 62),
    "cut": ints(-1, 2, 5, 2, 5, 6),
}  # fmt: skip

NEAREST = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}

CASES = [
    Case("Add", of_two("Add")),
    Case("Add:twice", (Node("Tanh", ("x",), ("a",)), Node("Add", ("a", "a"), ("y",)))),
    Case("Add:pixels", (Node("Tanh", ("x",), ("a",)), Node("Add", ("a", "c"), ("y",))), constants={"c": floats(9, 9)}),
    Case("Add:channels", (Node("Add", ("x", "c"), ("y",)),), constants={"c": floats(4, 1, 1)}),
    Case(
        "Add:scores",
        heads(
            Node("Transpose", ("k",), ("t",), {"perm": (0, 1, 3, 2)}),
            Node("MatMul", ("q", "t"), ("u",)),
            Node("Add", ("u", "bias"), ("y",)),
        ),
        (3, 5, 6),
        {"w": (6, 16)},
        {**HEADS, "bias": floats(1, 2, 5, 5)},
    ),
    Case(
        "BatchNormalization",
        (Node("BatchNormalization", ("x", "s", "b", "m", "v"), ("a",)), Node("Relu", ("a",), ("y",))),
        constants={"s": floats(4), "b": floats(4), "m": floats(4), "v": floats(4) ** 2},
    ),
    Case(
        "BatchNormalization:after_tokens",
        (
            Node("Transpose", ("x",), ("a",), {"perm": (0, 2, 3, 1)}),
            Node("LayerNormalization", ("a", "s"), ("c",)),
            Node("Transpose", ("c",), ("d",), {"perm": (0, 3, 1, 2)}),
            Node("BatchNormalization", ("d", "s", "b", "m", "v"), ("y",)),
        ),
        weights={"s": (4,)},
        constants={"b": floats(4), "m": floats(4), "v": floats(4) ** 2},
    ),
    Case(
        "Concat",
        (
            Node("Conv", ("x", "w"), ("a",)),
            Node("Concat", ("x", "a"), ("b",), {"axis": 1}),
            Node("Conv", ("b", "v"), ("c",)),
            Node("Concat", ("x", "a", "c"), ("d",), {"axis": 1}),
            Node("Relu", ("d",), ("y",)),
        ),
        weights={"w": (5, 4, 1, 1), "v": (3, 9, 1, 1)},
    ),
    Case("Concat:twice", (Node("Relu", ("x",), ("a",)), Node("Concat", ("a", "x", "a"), ("y",), {"axis": 1}))),
    Case("Concat:rows", (Node("Tanh", ("x",), ("a",)), Node("Concat", ("a", "x"), ("y",), {"axis": 2}))),
    Case(
        "Concat:token",
        (
            Node("MatMul", ("x", "w"), ("a",)),
            Node("Concat", ("t", "a"), ("b",), {"axis": 1}),
            Node("Add", ("b", "p"), ("y",)),
        ),
        TOKENS,
        {"w": (6, 8)},
        {"t": floats(1, 1, 8), "p": floats(1, 6, 8)},
    ),
    Case("Concat:windows", WINDOWS, (2, 4, 9, 9), {"w": (6, 4, 1, 1), "s": (6,)}, OF_WINDOWS),
    Case(
        "Concat:features",
        (
            Node("MatMul", ("x", "w"), ("a",)),
            Node("Slice", ("a", "zero", "far", "one", "two"), ("b",)),
            Node("Slice", ("a", "one", "far", "one", "two"), ("c",)),
            Node("Concat", ("b", "c"), ("d",), {"axis": 2}),
            Node("MatMul", ("d", "v"), ("y",)),
        ),
        (1, 6, 6),
        {"w": (6, 8), "v": (16, 3)},
        OF_WINDOWS,
    ),
    Case("Div:number", (Node("Div", ("x", "c"), ("y",)),), constants={"c": np.array(3, np.float32)}),
    Case("Div:tokens", (Node("Div", ("x", "c"), ("y",)),), TOKENS, constants={"c": floats(5, 1)}),
    Case(
        "Dropout:off",
        (
            Node("Tanh", ("x",), ("a",)),
            Node("Dropout", ("a", "", "off"), ("b",), {"seed": 3}),
            Node("Relu", ("b",), ("y",)),
        ),
        constants={"off": np.array(False)},
    ),
    Case(
        "Dropout:twice",
        (Node("Tanh", ("x",), ("a",)), Node("Dropout", ("a", "", "off"), ("b",)), Node("Add", ("a", "b"), ("y",))),
        constants={"off": np.array(False)},
    ),
    Case(
        "Einsum",
        heads(Node("Einsum", ("q", "k"), ("y",), {"equation": "b h i d, b h j d -> b h i j"})),
        (3, 5, 6),
        {"w": (6, 16)},
        HEADS,
    ),
    Case(
        "Einsum:order",
        heads(Node("Einsum", ("q", "k"), ("y",), {"equation": "bhid,bhjd->bihj"})),
        (2, 5, 6),
        {"w": (6, 16)},
        HEADS,
    ),
    Case(
        "Expand",
        (
            Node("ReduceL2", ("x", "axes"), ("a",)),
            Node("Expand", ("a", "shape"), ("b",)),
            Node("Div", ("x", "b"), ("y",)),
        ),
        TOKENS,
        constants={"axes": ints(-1), "shape": ints(3, 1, 5, 6)},
    ),
    Case(
        "Gather",
        (Node("Gather", ("x", "i"), ("y",), {"axis": 1}),),
        constants={"i": np.array([[0, -1, 2], [3, 3, 1]])},
    ),
    Case(
        "Gather:token",
        (Node("Tanh", ("x",), ("a",)), Node("Gather", ("a", "i"), ("y",), {"axis": 1})),
        TOKENS,
        constants={"i": np.array(0)},
    ),
    Case(
        "GatherND",
        (Node("Transpose", ("x",), ("a",), {"perm": (2, 3, 0, 1)}), Node("GatherND", ("a", "i"), ("y",))),
        constants={"i": np.array([[0, 1], [8, -1], [3, 3]])},
    ),
    Case("MatMul:left", (Node("MatMul", ("c", "x"), ("y",)),), (2, 5, 6), constants={"c": floats(7, 5)}),
    Case(
        "MatMul:batch",
        (Node("Tanh", ("x",), ("a",)), Node("MatMul", ("a", "c"), ("y",))),
        (2, 3, 5, 6),
        constants={"c": floats(3, 6, 7)},
    ),
    Case(
        "MatMul:heads",
        heads(
            Node("Mul", ("q", "half"), ("r",)),
            Node("Transpose", ("k",), ("t",), {"perm": (0, 1, 3, 2)}),
            Node("MatMul", ("r", "t"), ("u",)),
            Node("Softmax", ("u",), ("v",)),
            Node("MatMul", ("v", "k"), ("m",)),
            Node("Transpose", ("m",), ("n",), {"perm": (0, 2, 1, 3)}),
            Node("Reshape", ("n", "shape"), ("o",)),
            Node("MatMul", ("o", "z"), ("y",)),
        ),
        (3, 5, 6),
        {"w": (6, 16), "z": (8, 6)},
        {**HEADS, "half": np.array(0.5, np.float32), "shape": ints(-1, 5, 8)},
    ),
    Case("MaxPool:padded", one("MaxPool", kernel_shape=(3, 3), strides=(2, 2), pads=(1, 1, 1, 1))),
    Case(
        "Mul:scores",
        (Node("MatMul", ("x", "x"), ("a",)), Node("Mul", ("a", "c"), ("y",))),
        (2, 3, 5, 5),
        constants={"c": floats(3, 1, 1)},
    ),
    Case(
        "Pad",
        (Node("Pad", ("x", "pads", "fill"), ("y",)),),
        constants={"pads": ints(0, 1, 2, -1, 0, 0, 1, 3), "fill": np.array(7, np.float32)},
    ),
    Case(
        "Pad:reflect",
        (Node("Pad", ("x", "pads"), ("y",), {"mode": "reflect"}),),
        constants={"pads": ints(0, 0, 2, 1, 0, 0, 1, 3)},
    ),
    Case("ReduceL2", (Node("ReduceL2", ("x", "axes"), ("y",)),), constants={"axes": ints(-1)}),
    Case(
        "ReduceMean:tokens",
        (Node("ReduceMean", ("x", "axes"), ("y",), {"keepdims": 0}),),
        (2, 5, 6),
        constants={"axes": ints(1)},
    ),
    Case("ReduceSum", (Node("ReduceSum", ("x", "axes"), ("y",), {"keepdims": 0}),), constants={"axes": ints(1, 3)}),
    Case(
        "Reshape:shuffle",
        (
            Node("Relu", ("x",), ("a",)),
            Node("Reshape", ("a", "groups"), ("b",)),
            Node("Transpose", ("b",), ("c",), {"perm": (0, 2, 1, 3, 4)}),
            Node("Reshape", ("c", "image"), ("d",)),
            Node("Split", ("d",), ("e", "f"), {"axis": 1, "num_outputs": 2}),
            Node("Conv", ("f", "w"), ("g",), {"pads": (1, 1, 1, 1)}),
            Node("Concat", ("e", "g"), ("y",), {"axis": 1}),
        ),
        weights={"w": (2, 2, 3, 3)},
        constants={"groups": ints(-1, 2, 2, 9, 9), "image": ints(-1, 4, 9, 9)},
    ),
    Case(
        "Slice",
        (Node("Slice", ("x", "zero", "far", "axes", "steps"), ("y",)),),
        constants={"zero": ints(-1, 1), "far": ints(-99, 9), "axes": ints(-1, 2), "steps": ints(-2, 3)},
    ),
    Case(
        "Split",
        (Node("Split", ("x", "sizes"), ("a", "b"), {"axis": 2}), Node("Relu", ("b",), ("y",))),
        constants={"sizes": ints(2, 7)},
    ),
    Case(
        "Squeeze",
        (Node("GlobalAveragePool", ("x",), ("a",)), Node("Squeeze", ("a", "axes"), ("y",))),
        constants={"axes": ints(-1, 2)},
    ),
    Case(
        "Unsqueeze",
        (Node("Tanh", ("x",), ("a",)), Node("Unsqueeze", ("a", "axes"), ("y",))),
        constants={"axes": ints(1, -1)},
    ),
    Case("Transpose:images", (Node("Relu", ("x",), ("a",)), Node("Transpose", ("a",), ("y",), {"perm": (1, 0, 3, 2)}))),
    Case(
        "Where",
        (Node("Relu", ("x",), ("a",)), Node("Where", ("c", "zero", "a"), ("y",))),
        constants={"c": floats(9, 1) > 0, "zero": np.array(0, np.float32)},
    ),
    Case(
        "Add:bias",
        (Node("MatMul", ("x", "w"), ("a",)), Node("Add", ("a", "b"), ("y",))),
        TOKENS,
        {"w": (6, 8), "b": (8,)},
    ),
    Case("AveragePool", one("AveragePool", kernel_shape=(2, 2), strides=(2, 2))),
    Case(
        "Clip",
        (Node("Clip", ("x", "low", "high"), ("y",)),),
        constants={"low": np.array(-0.5, np.float32), "high": np.array(0.5, np.float32)},
    ),
    Case(
        "Conv", (Node("Conv", ("x", "w", "b"), ("y",), {"pads": (1, 1, 1, 1)}),), weights={"w": (6, 4, 3, 3), "b": (6,)}
    ),
    Case("Conv:depthwise", (Node("Conv", ("x", "w"), ("y",), {"group": 4}),), weights={"w": (4, 1, 3, 3)}),
    Case(
        "Conv:large",
        (Node("Conv", ("x", "w"), ("y",)),),
        (1, 2, 40, 40),
        {"w": (3, 2, 3, 3)},
    ),
    Case("Conv:strided", (Node("Conv", ("x", "w"), ("y",), {"strides": (2, 2)}),), weights={"w": (6, 4, 1, 1)}),
    Case("Div", of_two("Div")),
    Case("Elu", one("Elu", alpha=0.7)),
    Case("Flatten", one("Flatten")),
    Case("Gelu", one("Gelu")),
    Case("Gelu:tanh", one("Gelu", approximate="tanh")),
    Case("Gemm", (Node("Gemm", ("x", "w", "b"), ("y",), {"transB": 1}),), (1, 12), {"w": (7, 12), "b": (7,)}),
    Case("Gemm:batch", (Node("Gemm", ("x", "w", "b"), ("y",), {"transB": 1}),), (5, 12), {"w": (7, 12), "b": (7,)}),
    Case("GlobalAveragePool", one("GlobalAveragePool")),
    Case("HardSigmoid", one("HardSigmoid")),
    Case("HardSwish", one("HardSwish")),
    Case("Identity", (Node("Conv", ("x", "w"), ("a",)), Node("Identity", ("a",), ("y",))), weights={"w": (5, 4, 1, 1)}),
    Case("Identity:input", one("Identity")),
    Case("LayerNormalization", (Node("LayerNormalization", ("x", "s", "b"), ("y",)),), TOKENS, {"s": (6,), "b": (6,)}),
    Case(
        "LayerNormalization:in_steps",
        (
            Node("ReduceMean", ("x", "last"), ("m",)),
            Node("Sub", ("x", "m"), ("d",)),
            Node("Pow", ("d", "square"), ("p",)),
            Node("ReduceMean", ("p", "last"), ("v",)),
            Node("Add", ("v", "epsilon"), ("a",)),
            Node("Sqrt", ("a",), ("r",)),
            Node("Div", ("d", "r"), ("q",)),
            Node("Mul", ("q", "s"), ("f",)),
            Node("Add", ("f", "b"), ("y",)),
        ),
        TOKENS,
        {"s": (6,), "b": (6,)},
        {"last": ints(-1), "square": np.array(2, np.float32), "epsilon": np.array(1e-5, np.float32)},
    ),
    Case("LeakyRelu", one("LeakyRelu", alpha=0.2)),
    Case("MatMul", (Node("MatMul", ("x", "w"), ("y",)),), TOKENS, {"w": (6, 8)}),
    Case("MaxPool", one("MaxPool", kernel_shape=(2, 2), strides=(2, 2))),
    Case("Mul", of_two("Mul")),
    Case(
        "Mul:channels",
        (Node("GlobalAveragePool", ("x",), ("a",)), Node("Mul", ("x", "a"), ("y",))),
    ),
    Case("ReduceMean", (Node("ReduceMean", ("x", "axes"), ("y",)),), constants={"axes": np.array([2, 3])}),
    Case("Relu", one("Relu")),
    Case("Reshape", (Node("Reshape", ("x", "shape"), ("y",)),), constants={"shape": np.array([2, 12, 27])}),
    Case(
        "Resize",
        (
            Node("Conv", ("x", "w"), ("a",)),
            Node("Resize", ("a", "", "scales"), ("b",), NEAREST),
            Node("Conv", ("b", "v"), ("y",), {"pads": (1, 1, 1, 1)}),
        ),
        weights={"w": (5, 4, 1, 1), "v": (3, 5, 3, 3)},
        constants={"scales": np.array([1, 1, 2, 2], np.float32)},
    ),
    Case(
        "Resize:sizes",
        (Node("Tanh", ("x",), ("a",)), Node("Resize", ("a", "", "", "sizes"), ("y",), {"axes": (3, 2)})),
        constants={"sizes": ints(7, 13)},
    ),
    Case("Sigmoid", one("Sigmoid")),
    Case("Softmax", one("Softmax"), TOKENS),
    Case("Sub", of_two("Sub")),
    Case("Swish", (Node("Sigmoid", ("x",), ("a",)), Node("Mul", ("x", "a"), ("y",)))),
    Case("Tanh", one("Tanh")),
    Case(
        "Transpose",
        (Node("MatMul", ("x", "w"), ("a",)), Node("Transpose", ("a",), ("y",), {"perm": (1, 0, 2)})),
        TOKENS,
        {"w": (6, 8)},
    ),
]
"""At least one case for each rule; further ones reach another kernel, or another branch of the rule."""


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_rule_lowers_to_kernels_that_agree_with_the_reference(machine, both, case):
    both(machine, list(case.nodes), case.tensors(), case.input(), case.constants)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_plan_file_of_each_rule_is_accepted_and_computes_the_same_bits(machine, case):
    # The library checks every float that an op touches, so a check that is too strict shows here.
    content = plan_bytes(CaseModel(case), case.shape[0], chosen_levels(()))
    file, x = PlanFile(content, threads=2), case.input()
    found = file.run(x)[case.nodes[-1].outputs[0]]
    if file.text("level") == level():
        expected = Plan(*decode(CaseModel(case)), case.shape, machine).run(x)[0]
        assert found.tobytes() == expected.tobytes()
    else:
        np.testing.assert_allclose(found, Interpreter(*decode(CaseModel(case))).run(x)[0], rtol=1e-4, atol=1e-4)


def test_every_rule_has_a_case():
    assert {case.operator for case in CASES} == set(RULES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_missing_rule_is_noticed(machine, monkeypatch, case):
    """The check of `both` works: without its rule, the node of the case is a fallback."""
    without = {op: rule for op, rule in RULES.items() if op != case.operator}
    monkeypatch.setattr("dsr_tool.runtime.compiler.plan.RULES", without)
    machine.packer.clear()
    plan = Plan(case.graph(), case.tensors(), case.shape, machine)
    assert case.operator in [entry.operator for entry in plan.coverage.fallbacks]
    assert {entry.reason for entry in plan.coverage.fallbacks if entry.operator == case.operator} == {"no kernel"}


@pytest.mark.parametrize("error", [AttributeError, IndexError, KeyError, TypeError, ValueError, ZeroDivisionError])
def test_a_rule_that_raises_is_a_fallback_that_names_the_error(machine, both, monkeypatch, error):
    def broken(low, *_, **__):
        low.planes("x")
        raise error("a typo")

    monkeypatch.setattr("dsr_tool.runtime.compiler.plan.RULES", {**RULES, "Tanh": broken})
    case = next(case for case in CASES if case.name == "Sub")
    plan = Plan(case.graph(), {}, case.shape, machine)
    (fallback,) = plan.coverage.fallbacks
    assert (fallback.operator, fallback.output, fallback.failed) == ("Tanh", "a", True)
    assert fallback.reason.startswith(f"failed: {error.__name__}: ")
    assert "a typo" in fallback.reason
    assert "(test_rules.py:" in fallback.reason
    np.testing.assert_allclose(plan.run(case.input())[0], Interpreter(case.graph(), {}).run(case.input())[0], atol=1e-6)
    with pytest.raises(AssertionError, match="a typo"):
        both(machine, list(case.nodes), {}, case.input(), fallback=("Tanh",))


def test_what_a_rule_adds_before_it_declines_is_removed(machine, monkeypatch):
    def declines(low, *_, **__):
        low.planes("x")

    monkeypatch.setattr("dsr_tool.runtime.compiler.plan.RULES", {**RULES, "Tanh": declines})
    case = next(case for case in CASES if case.name == "Tanh")
    plan = Plan(case.graph(), {}, case.shape, machine)
    assert plan.coverage.fallbacks == (Fallback("Tanh", "y", "declined"),)
    assert not any(isinstance(step, KernelStep) for step in plan.steps)


def test_every_kernel_is_reached():
    kinds, activations, combinations = set(), set(), set()
    machine = Machine(library(), 1)
    for case in CASES:
        machine.packer.clear()
        plan = Plan(case.graph(), case.tensors(), case.shape, machine)
        for step in plan.steps:
            for op in step.ops if isinstance(step, KernelStep) else ():
                kinds.add(Kind(op.kind))
                activations.add(Activation(op.activation))
                if op.kind == Kind.COMBINE:
                    combinations.add(Combination(op.combine.how))
    assert kinds == set(Kind)
    assert activations == set(Activation)
    assert combinations == set(Combination)


def test_a_sentence_and_a_document_name_the_fallbacks():
    fallbacks = [Fallback(op, "y", "no kernel") for op in ("Tile", "GridSample", "Tile")]
    document = Coverage(124, tuple(fallbacks)).to_dict()
    assert document == {"nodes": 124, "on_reference": 3, "operators": ["Tile", "GridSample"]}
    assert coverage_text(document) == "3 of 124 nodes run on the reference: Tile, GridSample"
    assert coverage_text(Coverage(124).to_dict()) == "all 124 nodes run on compiled kernels"
