"""One node of a graph as a call of a numpy function, which the interpreter and the compiler's fallbacks share."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from dsr_tool.errors import FormatError, UsageError, first_line
from dsr_tool.graph.ir import Node
from dsr_tool.graph.limits import claim
from dsr_tool.graph.operators import VARIADIC, Operator, operator_of
from dsr_tool.runtime.reference import (
    NumpyFunction,
    convolution,
    elementwise,
    matmul,
    pooling,
    reduce,
    resize,
    sampling,
    shapes,
    transposed,
)
from dsr_tool.sparsity.tensor import Array, Weight, dense

__all__ = ["FUNCTIONS", "Call", "bind", "check_total", "fold"]

FUNCTIONS: dict[str, NumpyFunction] = {
    **convolution.FUNCTIONS,
    **elementwise.FUNCTIONS,
    **matmul.FUNCTIONS,
    **pooling.FUNCTIONS,
    **reduce.FUNCTIONS,
    **resize.FUNCTIONS,
    **sampling.FUNCTIONS,
    **shapes.FUNCTIONS,
    **transposed.FUNCTIONS,
}
"""The function of every operator that the reference computes, by the operator's name."""

_WITH_WEIGHTS: dict[str, Callable[..., Callable[[Array], Array]]] = {
    "Conv": convolution.prepare_conv,
    "ConvTranspose": transposed.prepare_conv_transpose,
    "Gemm": matmul.prepare_gemm,
    "MatMul": matmul.prepare_matmul,
}
"""Functions of the weights, all inputs but the first, that return the operator as a function of the first input. What
they do with the weights, such as building a CSR matrix, is done once and not in every run."""


@dataclass(frozen=True)
class Call:
    """A node that is ready to be computed.

    Attributes:
        node: the node.
        function: its function, with the attributes bound to it and possibly the weights.
        inputs: names of the arguments that are left; an empty name stands for None.
    """

    node: Node
    function: NumpyFunction
    inputs: tuple[str, ...]

    def compute(self, arguments: Iterable[Array | None]) -> dict[str, Array]:
        """Returns the outputs by name.

        Args:
            arguments: an array for each of `inputs`.

        Raises:
            FormatError: the arguments do not fit the operator.
            UsageError: the operator has a form that the reference does not compute.
        """
        outputs = self.node.outputs
        with _errors_name(self.node):
            result = self.function(*arguments)
            results = result if isinstance(result, tuple) else (result,)
            if operator_of(self.node.op).all_outputs and len(results) != len(outputs):
                raise ValueError(f"it returns {len(results)} values, but the node has {len(outputs)} outputs")
        # Further outputs of other operators are not computed; `live_nodes` refuses graphs that read them.
        return {name: np.asarray(array) for name, array in zip(outputs, results, strict=False) if name}


def bind(node: Node, known: Mapping[str, Weight]) -> Call:
    """Binds the attributes of a node to its function, and its weights where they are known.

    Args:
        node: the node.
        known: weights and constants by name.

    Raises:
        UsageError: the reference does not compute this operator.
        FormatError: the number of inputs is wrong, or the weights do not fit each other.
    """
    if node.op not in FUNCTIONS:
        raise UsageError(
            f"{_described(node)} is not known to the sparse runtime; export the model to ONNX and run it with "
            f"onnxruntime, or replace that layer."
        )
    operator = operator_of(node.op)
    _check_inputs(node, operator)
    attributes = {name: value for name, value in node.attributes.items() if name not in operator.inert}
    first, others = node.inputs[:1], node.inputs[1:]
    # A node whose first input is known too is folded: it runs once, so preparing its weights would cost more.
    prepare = _WITH_WEIGHTS.get(node.op)
    if prepare is None or first[0] in known or not all(name in known for name in others if name):
        return Call(node, functools.partial(FUNCTIONS[node.op], **attributes), node.inputs)
    with _errors_name(node):
        return Call(node, prepare(*(known.get(name) for name in others), **attributes), first)


def _check_inputs(node: Node, operator: Operator) -> None:
    # Checked here, because a numpy ufunc would take one input too many as an output array and write into it.
    least, most, count = operator.min_inputs, operator.max_inputs, len(node.inputs)
    if not least <= count <= most:
        limit = {least: "", least + 1: f" or {most}", VARIADIC: " or more"}.get(most, f" to {most}")
        raise FormatError(f"{_described(node)} has {count} inputs, expected {least}{limit}; the graph is invalid.")
    if not all(node.inputs if most == VARIADIC else node.inputs[:least]):
        raise FormatError(f"{_described(node)} has no input {node.inputs.index('')}; the graph is invalid.")


def fold(call: Call, known: Mapping[str, Weight]) -> dict[str, Array]:
    """Computes a node whose inputs are all known, and returns its outputs by name."""
    outputs = call.compute(dense(known[name]) if name else None for name in call.inputs)
    # A view would keep the whole array alive of which it is a part.
    return {
        name: array.copy() if getattr(array.base, "nbytes", 0) > array.nbytes else array
        for name, array in outputs.items()
    }


def check_total(node: Node, nbytes: int, limit: int) -> None:
    """Raises `FormatError` if the values up to a node need more bytes together than the limit of one value."""
    if nbytes > limit:
        with _errors_name(node):
            claim((nbytes,), np.uint8)


def _described(node: Node) -> str:
    return f"operator {node.op} (output {node.outputs[0][:80]!r})"


@contextlib.contextmanager
def _errors_name(node: Node) -> Iterator[None]:
    """Turns the errors of numpy and scipy on arguments that do not fit into a `FormatError` that names the node."""
    try:
        yield
    # A function that does not support a form of its operator says so in its own words.
    except UsageError as error:
        raise UsageError(f"{_described(node)} cannot be computed: {error}") from error
    except (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError) as error:
        raise FormatError(
            f"{_described(node)} cannot be computed: {first_line(error)[:200]}; the graph does not fit its weights or "
            f"input."
        ) from error
