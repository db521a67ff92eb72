"""From a graph and its weights to a list of prepared callables, and their execution."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dsr_tool.errors import FormatError, UsageError, first_line
from dsr_tool.graph.ir import Graph, Node
from dsr_tool.graph.limits import FREE_BYTES, claim, room
from dsr_tool.runtime.reference import convolution, elementwise, matmul, pooling, reduce, resize, shapes
from dsr_tool.runtime.reference.operator import Kernel, Table, takes
from dsr_tool.sparsity.tensor import Array, SparseTensor, Weight, dense

__all__ = [
    "INERT",
    "MAX_FOLDED_RATIO",
    "MAX_HELD_RATIO",
    "OPERATORS",
    "Folded",
    "Plan",
    "array_of",
    "compute",
    "folded_by",
    "kernel_of",
    "nbytes_of",
    "needed",
    "require_opset",
    "returned",
]

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

_SEVERAL = frozenset({"Split"})
"""Operators of which all outputs are computed; of the others, the first is."""

MAX_FOLDED_RATIO, MAX_HELD_RATIO = 10, 10_000
"""What is computed from the weights alone may take so often what they take; what is held while running, what the
input takes."""

INERT = frozenset({"momentum", "saturate", "seed", "stash_type", "storage_order"})
"""Attributes that change nothing in what is computed here."""


Folded = dict[tuple[str, ...], dict[str, Array]]
"""What was computed from weights and constants alone, by the outputs of its node."""


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

    def __init__(self, graph: Graph, tensors: Mapping[str, SparseTensor], folded: Folded | None = None) -> None:
        """Prepare every operator that the first output depends on.

        Args:
            graph: one input; operators of the ONNX standard from operator set 18 on.
            tensors: a tensor for each of the graph's parameters.
            folded: what another plan of this graph has computed already before it gave up.

        Raises:
            UsageError: an operator, a form of one, or an operator set that this runtime does not know.
            FormatError: the weights do not fit the graph, or what is computed from them takes too much memory.
        """
        require_opset(graph)
        self._input, self._output = graph.inputs[0].name, graph.outputs[0].name
        self._steps: list[_Step] = []
        self._constants: dict[str, Array] = {}
        known: dict[str, Weight] = {**graph.constants, **{name: tensors[name] for name in graph.parameters}}
        self._prepare(graph.nodes, known, folded or {})

    def _prepare(self, nodes: Sequence[Node], known: dict[str, Weight], done: Folded) -> None:
        """Compute what is `known` and not `done` yet, and keep the steps that are left."""
        limit, folded = FREE_BYTES + MAX_FOLDED_RATIO * sum(map(nbytes_of, known.values())), 0
        # Infinities and NaN follow IEEE, as in the standard, and are the caller's to judge.
        with room(limit), np.errstate(all="ignore"):
            for node, release in needed(nodes, self._output):
                kernel, inputs = kernel_of(node, known)
                if all(name in known for name in inputs if name):
                    made = done.get(node.outputs) or folded_by(node, kernel, [array_of(known, name) for name in inputs])
                    folded += _total(made)
                    _check(node, folded, limit)
                    known.update(made)
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
            FormatError: a value does not fit the operator that reads it, or values take too much memory.
        """
        values: dict[str, Array] = {**self._constants, self._input: x}
        limit, held = FREE_BYTES + MAX_HELD_RATIO * x.nbytes, x.nbytes
        with room(limit), np.errstate(all="ignore"):
            for step in self._steps:
                made = compute(step.node, step.kernel, [values[name] if name else None for name in step.inputs])
                held += _total(made)
                _check(step.node, held, limit)
                values.update(made)
                # Nothing else may hold on to a value that nobody reads any more.
                del made
                for name in step.release:
                    held -= values[name].nbytes if name in values and name not in self._constants else 0
                    values.pop(name, None)
        return returned(values[self._output], constant=self._output in self._constants)


def folded_by(node: Node, kernel: Kernel, inputs: Sequence[Array | None]) -> dict[str, Array]:
    """What a node makes of constants, without the larger arrays that it may be a part of."""
    made = compute(node, kernel, inputs)
    return {
        name: array.copy() if getattr(array.base, "nbytes", 0) > array.nbytes else array for name, array in made.items()
    }


def returned(array: Array, *, constant: bool) -> Array:
    """An array that the caller may change: nothing of the plan's, and in order."""
    return np.array(array, order="C") if constant or not array.flags.owndata else np.asarray(array, order="C")


def require_opset(graph: Graph) -> None:
    """Raise `UsageError` for an operator set whose operators mean something else."""
    if graph.opset < _OLDEST_OPSET:
        raise UsageError(
            f"the graph uses operator set {graph.opset} of ONNX; the sparse runtime computes {_OLDEST_OPSET} and "
            f"newer, so convert the model to operator set 20."
        )


def needed(nodes: Sequence[Node], output: str) -> Iterable[tuple[Node, tuple[str, ...]]]:
    """The nodes that `output` depends on, in order, each with the values that nobody reads after it."""
    later = {output}
    result: list[tuple[Node, tuple[str, ...]]] = []
    for node in reversed(nodes):
        made = {name for name in node.outputs if name}
        if not made & later:
            continue
        if (extra := made & later - {node.outputs[0]}) and node.op not in _SEVERAL:
            raise UsageError(
                f"{_called(node)} has a second output {min(extra)!r}, which this runtime does not compute."
            )
        touched = made | {name for name in node.inputs if name}
        result.append((node, tuple(sorted(touched - later))))
        later |= touched
    return reversed(result)


def kernel_of(node: Node, known: Mapping[str, Weight]) -> tuple[Kernel, tuple[str, ...]]:
    """The callable of a node, and the values that it takes."""
    if node.op not in OPERATORS:
        raise UsageError(
            f"{_called(node)} is not known to the sparse runtime; export the model to ONNX and run it with "
            f"onnxruntime, or replace that layer."
        )
    least, most = takes(OPERATORS[node.op])
    present = node.inputs if most == math.inf else node.inputs[:least]
    if not least <= len(node.inputs) <= most or not all(present):
        raise FormatError(f"{_called(node)} has an input too many or too few; the graph is damaged.")
    attributes = {name: value for name, value in node.attributes.items() if name not in INERT}
    first, others = node.inputs[:1], node.inputs[1:]
    prepare = _PREPARED.get(node.op)
    if prepare is None or first[0] in known or not all(name in known for name in others if name):
        return functools.partial(OPERATORS[node.op], **attributes), node.inputs
    with _explained(node):
        return prepare(*(known.get(name) for name in others), **attributes), first


def compute(node: Node, kernel: Kernel, arguments: Iterable[Array | None]) -> dict[str, Array]:
    """The outputs of a node by name; what does not fit becomes a `FormatError` about it."""
    with _explained(node):
        result = kernel(*arguments)
        results = result if isinstance(result, tuple) else (result,)
        if len(results) != len(node.outputs) and node.op in _SEVERAL:
            raise ValueError(f"it makes {len(results)} pieces, not {len(node.outputs)}")
    return {name: np.asarray(array) for name, array in zip(node.outputs, results, strict=False) if name}


def _total(made: Mapping[str, Array]) -> int:
    return sum(array.nbytes for array in made.values())


def _check(node: Node, nbytes: int, limit: int) -> None:
    """Raise where values together take more than one value alone may."""
    if nbytes > limit:
        with _explained(node):
            claim((nbytes,), np.uint8)


def nbytes_of(weight: Weight) -> int:
    """Bytes of a weight with its zeros."""
    if isinstance(weight, SparseTensor):
        return weight.mask.size * weight.values.itemsize
    return weight.nbytes


def array_of(known: Mapping[str, Weight], name: str) -> Array | None:
    """A weight with its zeros; None for an input that is left out."""
    return dense(known[name]) if name else None


def _called(node: Node) -> str:
    return f"operator {node.op} (which makes {node.outputs[0][:80]!r})"


@contextlib.contextmanager
def _explained(node: Node) -> Iterator[None]:
    """Turn what numpy and scipy raise on arguments that do not fit into one sentence about the node."""
    try:
        yield
    except UsageError:
        raise
    except (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError) as error:
        raise FormatError(
            f"{_called(node)} cannot be computed: {first_line(error)[:200]}; the graph does not fit its weights or "
            f"input."
        ) from error
