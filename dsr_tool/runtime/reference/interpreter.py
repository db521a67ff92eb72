"""The interpreter: runs a graph node by node with the functions of the reference."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dsr_tool.errors import UsageError
from dsr_tool.graph.ir import Graph, Node
from dsr_tool.graph.limits import folding_limit, memory_limit, running_limit
from dsr_tool.graph.operators import operator_of
from dsr_tool.runtime.reference.call import Call, bind, check_total, fold
from dsr_tool.sparsity.at_rest import dtype_of
from dsr_tool.sparsity.tensor import Array, SparseTensor, Weight, dense

__all__ = ["Folded", "Interpreter", "check_opset", "dense_bytes", "for_caller", "live_nodes"]

_MIN_OPSET = 18
"""Oldest operator set of ONNX that the functions compute: since then ReduceMean takes its axes as an input."""

Folded = dict[tuple[str, ...], dict[str, Array]]
"""Values computed from weights and constants alone: the outputs of a node -> each output's array by name."""


@dataclass(frozen=True)
class _Step:
    call: Call
    release: tuple[str, ...]  # values that no later step reads


class Interpreter:
    """Computes the outputs of a graph from its input.

    Values that depend on weights and constants alone are computed once, at the start. Weights of convolutions and
    matrix products are kept as matrices, sparse ones as CSR; every other value is freed after its last use.
    """

    def __init__(self, graph: Graph, tensors: Mapping[str, SparseTensor], folded: Folded | None = None) -> None:
        """Prepares every node that the outputs depend on.

        Args:
            graph: one input; operators of ONNX, operator set 18 or newer.
            tensors: a tensor for each of the graph's parameters.
            folded: values that the compiler had computed from the weights of this graph before it gave up.

        Raises:
            UsageError: an operator, a form of one, or the operator set is not supported.
            FormatError: the weights do not fit the graph, or the values computed from them need too much memory.
        """
        check_opset(graph)
        self._input, self._outputs = graph.inputs[0].name, tuple(value.name for value in graph.outputs)
        self._steps: list[_Step] = []
        self._constants: dict[str, Array] = {}
        known: dict[str, Weight] = {**graph.constants, **{name: tensors[name] for name in graph.parameters}}
        self._prepare(graph.nodes, known, folded or {})

    def _prepare(self, nodes: Sequence[Node], known: dict[str, Weight], done: Folded) -> None:
        """Folds the nodes whose inputs are `known`, unless they are `done`; the others become steps."""
        limit, total = folding_limit(sum(map(dense_bytes, known.values()))), 0
        # Infinities and NaN follow IEEE, as the standard asks; the caller judges the result.
        with memory_limit(limit), np.errstate(all="ignore"):
            for node, release in live_nodes(nodes, self._outputs):
                call = bind(node, known)
                if all(name in known for name in call.inputs if name):
                    outputs = done.get(node.outputs) or fold(call, known)
                    total += _nbytes(outputs)
                    check_total(node, total, limit)
                    known.update(outputs)
                else:
                    self._constants.update({name: dense(known[name]) for name in call.inputs if name in known})
                    self._steps.append(_Step(call, release))
                for name in release:
                    known.pop(name, None)
        self._constants.update({name: dense(known[name]) for name in self._outputs if name in known})

    def run(self, x: Array) -> tuple[Array, ...]:
        """Computes the outputs, in the order of the graph.

        Args:
            x: the input, of the shape and type that the graph declares.

        Raises:
            FormatError: a value does not fit the operator that reads it, or the values need too much memory.
        """
        values: dict[str, Array] = {**self._constants, self._input: x}
        limit, total = running_limit(x.nbytes), x.nbytes
        with memory_limit(limit), np.errstate(all="ignore"):
            for step in self._steps:
                outputs = step.call.compute(values[name] if name else None for name in step.call.inputs)
                total += _nbytes(outputs)
                check_total(step.call.node, total, limit)
                values.update(outputs)
                # This dict would keep its arrays alive until the next step has allocated its own.
                del outputs
                for name in step.release:
                    # Constants stay in memory for the next run, so their bytes are not freed.
                    total -= values[name].nbytes if name in values and name not in self._constants else 0
                    values.pop(name, None)
        return for_caller((values[name] for name in self._outputs), (x, *self._constants.values()))


def for_caller(arrays: Iterable[Array], shared: Iterable[Array]) -> tuple[Array, ...]:
    """Returns contiguous arrays that the caller may change: copies of what is `shared`, a view, or there twice."""
    taken = {id(array) for array in shared}
    results = []
    for array in arrays:
        own = array.flags.owndata and id(array) not in taken
        taken.add(id(array))
        results.append(np.asarray(array, order="C") if own else np.array(array, order="C"))
    return tuple(results)


def check_opset(graph: Graph) -> None:
    """Raises `UsageError` for an operator set in which operators have another meaning."""
    if graph.opset < _MIN_OPSET:
        raise UsageError(
            f"the graph uses operator set {graph.opset} of ONNX; the sparse runtime supports {_MIN_OPSET} and newer, "
            f"so convert the model to operator set 20."
        )


def live_nodes(nodes: Sequence[Node], outputs: Iterable[str]) -> Iterable[tuple[Node, tuple[str, ...]]]:
    """Returns the nodes that `outputs` depend on, in order, each with the values that no later node reads.

    Raises:
        UsageError: a value is read that is an output which the reference does not compute, such as the indices of
            MaxPool.
    """
    # Backwards, so that the first reader met of a value is the last one to run.
    later = set(outputs)
    result: list[tuple[Node, tuple[str, ...]]] = []
    for node in reversed(nodes):
        made = {name for name in node.outputs if name}
        if not made & later:
            continue
        if (extra := made & later - {node.outputs[0]}) and not operator_of(node.op).all_outputs:
            raise UsageError(
                f"output {min(extra)[:80]!r} of operator {node.op} is read, but only its first output is supported; "
                f"replace that layer."
            )
        touched = made | {name for name in node.inputs if name}
        result.append((node, tuple(sorted(touched - later))))
        later |= touched
    return reversed(result)


def dense_bytes(weight: Weight) -> int:
    """Returns the bytes of a weight with its zeros."""
    if isinstance(weight, SparseTensor):
        return weight.mask.size * dtype_of(weight).itemsize
    return weight.nbytes


def _nbytes(values: Mapping[str, Array]) -> int:
    return sum(array.nbytes for array in values.values())
