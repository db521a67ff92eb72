"""From a graph and its weights to a list of prepared callables, and their execution."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dsr_tool.core.codecs import SparseTensor
from dsr_tool.core.graph import Array, Graph, Node
from dsr_tool.errors import DsrError, FormatError, UsageError
from dsr_tool.runtime import convolution, elementwise, matmul, pooling, reduce, resize, shapes
from dsr_tool.runtime.kernels import Kernel, Table
from dsr_tool.runtime.matrices import Weight, dense

__all__ = ["OPERATORS", "Plan"]

OPERATORS: Table = {
    **convolution.OPERATORS,
    **elementwise.OPERATORS,
    **matmul.OPERATORS,
    **pooling.OPERATORS,
    **reduce.OPERATORS,
    **resize.OPERATORS,
    **shapes.OPERATORS,
}

# Operators that get ready once for weights that are known: all inputs but the first.
_PREPARED: Table = {
    "Conv": convolution.prepare_conv,
    "Gemm": matmul.prepare_gemm,
    "MatMul": matmul.prepare_matmul,
}

_OLDEST_OPSET = 18

# Attributes that change nothing in what is computed here.
_INERT = frozenset({"momentum", "saturate", "seed", "stash_type", "storage_order"})


@dataclass(frozen=True)
class _Step:
    node: Node
    kernel: Kernel
    inputs: tuple[str, ...]
    release: tuple[str, ...]  # values that nobody reads afterwards


class Plan:
    """The first output of a graph as a function of its input.

    What depends on weights and constants alone is computed once, here. Weights that enter a product are kept as
    matrices, sparse ones as CSR; every other value lives from its making to its last use.
    """

    def __init__(self, graph: Graph, tensors: Mapping[str, SparseTensor]) -> None:
        """Prepare every operator that the first output depends on.

        Args:
            graph: one input; operators of the ONNX standard from operator set 18 on.
            tensors: a tensor for each of the graph's parameters.

        Raises:
            UsageError: an operator, a form of one, or an operator set that this runtime does not know.
            FormatError: the weights do not fit the graph.
        """
        if graph.opset < _OLDEST_OPSET:
            raise UsageError(
                f"the graph uses operator set {graph.opset} of ONNX; the sparse runtime computes {_OLDEST_OPSET} and "
                f"newer, so convert the model to operator set 20."
            )
        self._input, self._output = graph.inputs[0].name, graph.outputs[0].name
        self._steps: list[_Step] = []
        known: dict[str, Weight] = {**graph.constants, **{name: tensors[name] for name in graph.parameters}}
        self._constants: dict[str, Array] = {}
        for node, release in _needed(graph.nodes, self._output):
            kernel, inputs = _kernel(node, known)
            if all(name in known for name in inputs if name):
                known.update(_compute(node, kernel, [_array(known, name) for name in inputs]))
            else:
                self._constants.update({name: dense(known[name]) for name in inputs if name in known})
                self._steps.append(_Step(node, kernel, inputs, release))
            for name in release:
                known.pop(name, None)
        if self._output in known:
            self._constants[self._output] = dense(known[self._output])

    def run(self, x: Array) -> Array:
        """Compute the first output for the input `x`, which must fit the graph.

        Raises:
            FormatError: a value does not fit the operator that reads it.
        """
        values: dict[str, Array] = {**self._constants, self._input: x}
        for step in self._steps:
            arguments = [values[name] if name else None for name in step.inputs]
            values.update(_compute(step.node, step.kernel, arguments))
            for name in step.release:
                values.pop(name, None)
        return np.asarray(values[self._output], order="C")


def _needed(nodes: Sequence[Node], output: str) -> Iterable[tuple[Node, tuple[str, ...]]]:
    """The nodes that `output` depends on, in order, each with the values that nobody reads after it."""
    later = {output}
    result: list[tuple[Node, tuple[str, ...]]] = []
    for node in reversed(nodes):
        made = {name for name in node.outputs if name}
        if not made & later:
            continue
        if (extra := made & later - {node.outputs[0]}) and node.op != "Split":
            raise UsageError(
                f"{_called(node)} has a second output {min(extra)!r}, which this runtime does not compute."
            )
        touched = made | {name for name in node.inputs if name}
        result.append((node, tuple(sorted(touched - later))))
        later |= touched
    return reversed(result)


def _kernel(node: Node, known: Mapping[str, Weight]) -> tuple[Kernel, tuple[str, ...]]:
    """The callable of a node, and the values that it takes."""
    if node.op not in OPERATORS:
        raise UsageError(
            f"{_called(node)} is not known to the sparse runtime; export the model to ONNX and run it with "
            f"onnxruntime, or replace that layer."
        )
    attributes = {name: value for name, value in node.attributes.items() if name not in _INERT}
    first, others = "".join(node.inputs[:1]), node.inputs[1:]
    prepare = _PREPARED.get(node.op)
    if prepare is None or first in known or not all(name in known for name in others if name):
        return functools.partial(OPERATORS[node.op], **attributes), node.inputs
    with _explained(node):
        return prepare(*(known.get(name) for name in others), **attributes), (first,)


def _compute(node: Node, kernel: Kernel, arguments: Iterable[Array | None]) -> dict[str, Array]:
    # Infinities and NaN follow IEEE, as in the standard, and are the caller's to judge.
    with _explained(node), np.errstate(all="ignore"):
        result = kernel(*arguments)
    results = result if isinstance(result, tuple) else (result,)
    return {name: np.asarray(array) for name, array in zip(node.outputs, results, strict=False) if name}


def _array(known: Mapping[str, Weight], name: str) -> Array | None:
    return dense(known[name]) if name else None


def _called(node: Node) -> str:
    return f"operator {node.op} (which makes {node.outputs[0]!r})"


@contextlib.contextmanager
def _explained(node: Node) -> Iterator[None]:
    """Turn what numpy and scipy raise on arguments that do not fit into one sentence about the node."""
    try:
        yield
    except DsrError:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise FormatError(
            f"{_called(node)} cannot be computed: {error}; the graph does not fit its weights or input."
        ) from error
