"""Fixtures that compare one node or one small graph in ONNX Runtime, in the reference and on the compiled kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from dsr_tool.graph.ir import Graph, Node, Value
from dsr_tool.runtime.compiler.machine import Machine
from dsr_tool.runtime.compiler.plan import Plan
from dsr_tool.runtime.kernels.library import library
from dsr_tool.runtime.reference.call import FUNCTIONS
from dsr_tool.runtime.reference.interpreter import Interpreter
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor

OPSET = 20


def _onnxruntime(
    op: str, arrays: list[np.ndarray | None], outputs: int, attributes: Mapping[str, Any]
) -> list[np.ndarray]:
    """Returns the outputs of one node in ONNX Runtime; None among the arrays stands for an absent optional input."""
    feeds = {f"i{i}": array for i, array in enumerate(arrays) if array is not None}
    names = [f"i{i}" if array is not None else "" for i, array in enumerate(arrays)]
    results = [f"o{i}" for i in range(outputs)]
    kinds = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in feeds.items()}
    graph = helper.make_graph(
        [helper.make_node(op, names, results, **attributes)],
        "one node",
        [helper.make_tensor_value_info(name, kinds[name], array.shape) for name, array in feeds.items()],
        [helper.make_empty_tensor_value_info(name) for name in results],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)
    model = onnx.shape_inference.infer_shapes(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return list(session.run(None, feeds))


def _interpret(op: str, arrays: list[np.ndarray | None], outputs: int, attributes: Mapping[str, Any]) -> np.ndarray:
    """Returns the first output of a one-node graph in the reference.

    The first array is the input of the graph; of the others, float32 arrays are weights and the rest are constants.
    """
    others = {f"i{i}": array for i, array in enumerate(arrays) if array is not None and i > 0}
    names = tuple(f"i{i}" if array is not None else "" for i, array in enumerate(arrays))
    tensors = {
        name: SparseTensor.from_dense(array, Mask.from_bool(array != 0))
        for name, array in others.items()
        if array.dtype == np.float32
    }
    constants = {name: array for name, array in others.items() if name not in tensors}
    graph = Graph(
        (Value("i0", ()),),
        (Value("o0", ()),),
        (Node(op, names, tuple(f"o{i}" for i in range(outputs)), attributes),),
        constants,
        tuple(tensors),
        OPSET,
    )
    return Interpreter(graph, tensors).run(arrays[0])[0]


@pytest.fixture(scope="session")
def agree() -> Callable[..., None]:
    """Asserts that the reference's function of an operator, and a graph of one such node, agree with ONNX Runtime."""

    def check(op: str, *arrays: np.ndarray | None, outputs: int = 1, rtol: float = 1e-5, **attributes: Any) -> None:
        inputs = [None if array is None else np.asarray(array) for array in arrays]
        expected = _onnxruntime(op, inputs, outputs, attributes)
        with np.errstate(all="ignore"):
            bare = FUNCTIONS[op](*inputs, **attributes)
        found = [np.asarray(array) for array in (bare if isinstance(bare, tuple) else (bare,))]
        assert len(found) == len(expected)
        for ours, theirs in [
            *zip(found, expected, strict=True),
            (_interpret(op, inputs, outputs, attributes), expected[0]),
        ]:
            assert ours.shape == theirs.shape
            assert ours.dtype == theirs.dtype
            # The tolerance follows the inputs as well: a sum that nearly cancels is only as exact as its terms.
            floats = [array for array in (theirs, *inputs) if array is not None and array.dtype.kind == "f"]
            finite = (np.abs(array[np.isfinite(array)]).max(initial=0) for array in floats)
            scale = max(finite, default=0) if theirs.dtype.kind == "f" else 0
            np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=rtol * float(scale))

    return check


@pytest.fixture(scope="session", params=[1, 3])
def machine(request: pytest.FixtureRequest) -> Machine:
    """One machine for all tests, so that each finds in the arena what the one before left."""
    return Machine(library(), request.param)


@pytest.fixture(scope="session")
def sparse() -> Callable[..., SparseTensor]:
    """Returns a function that makes a weight with random active entries; `density` is their expected share."""

    def make(rng: np.random.Generator, shape: tuple[int, ...], density: float) -> SparseTensor:
        mask = rng.random(shape) < density
        return SparseTensor(Mask.from_bool(mask), rng.standard_normal(int(mask.sum())).astype(np.float32))

    return make


@pytest.fixture(scope="session")
def both() -> Callable[..., Plan]:
    """Runs a graph on the kernels and on the reference, and asserts that the kernels ran and that both agree.

    Every node must run on a kernel, except for those whose operators `fallback` lists: one entry for each such node, in
    the order of the graph. Without this, a rule that declines would let the reference be compared with itself. No
    lowering rule may raise. The plan runs twice, since the second run finds in memory what the first one left.

    Returns the plan of the kernels.
    """

    def check(
        machine: Machine,
        nodes: list[Node],
        tensors: dict[str, SparseTensor],
        x: np.ndarray,
        constants: Mapping[str, np.ndarray] | None = None,
        *,
        fallback: Sequence[str] = (),
    ) -> Plan:
        last = nodes[-1].outputs[0]
        graph = Graph((Value("x", x.shape),), (Value(last, ()),), tuple(nodes), constants or {}, tuple(tensors), OPSET)
        (expected,) = Interpreter(graph, tensors).run(x)
        # Packed weights are cached by name, and the previous test used the same names for other weights.
        machine.packer.clear()
        plan = Plan(graph, tensors, x.shape, machine)
        assert not [entry.reason for entry in plan.coverage.fallbacks if entry.failed]
        assert [entry.operator for entry in plan.coverage.fallbacks] == list(fallback)
        for _ in range(2):
            # Freed memory may hold the reference's result, and an op that writes nothing would return it as its own.
            # So arrays of NaN are freed first; numpy keeps up to seven of one size, and hands them out again.
            [np.full(expected.shape, np.nan, np.float32) for _ in range(8)]
            (found,) = plan.run(x)
            assert found.shape == expected.shape
            assert found.dtype == expected.dtype
            scale = float(np.abs(expected[np.isfinite(expected)]).max(initial=0))
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=3e-6 * scale + 1e-30)
        return plan

    return check
