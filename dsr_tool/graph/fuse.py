"""Small changes of a graph before it is put down: what does nothing goes, and what has one kernel becomes one node."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from dsr_tool.graph.ir import Node
from dsr_tool.sparsity.tensor import Weight

__all__ = ["rewritten"]

_NOTHING = frozenset({"Identity", "Dropout"})
_GATES = {"Sigmoid": "Swish", "HardSigmoid": "HardSwish"}


def rewritten(nodes: Sequence[Node], known: Mapping[str, Weight], output: str) -> list[Node]:
    """The nodes that compute the same.

    Args:
        nodes: in order.
        known: weights and constants by name.
        output: the value that is asked for.
    """
    return _gated(_renamed(nodes, known, output), output)


def _renamed(nodes: Sequence[Node], known: Mapping[str, Weight], output: str) -> list[Node]:
    """Without nodes that hand on what they get; their readers read that."""
    other: dict[str, str] = {}
    kept = []
    for given in nodes:
        node = dataclasses.replace(given, inputs=tuple(other.get(name, name) for name in given.inputs))
        if node.op in _NOTHING and node.inputs and node.inputs[0] not in known and node.outputs[0] != output:
            other[node.outputs[0]] = node.inputs[0]
        else:
            kept.append(node)
    return kept


def _gated(nodes: Sequence[Node], output: str) -> list[Node]:
    """X * sigmoid(x) as one node, and the same with the hard sigmoid."""
    readers: dict[str, list[Node]] = {}
    for node in nodes:
        for name in node.inputs:
            readers.setdefault(name, []).append(node)
    result, dropped = [], set[str]()
    gates = {node.outputs[0]: node for node in nodes if node.op in _GATES and len(node.inputs) == 1}
    for node in nodes:
        gate = next((gates[name] for name in node.inputs if name in gates), None) if node.op == "Mul" else None
        if gate is not None and gate.outputs[0] != output and len(readers[gate.outputs[0]]) == 1:
            x = gate.inputs[0]
            if sorted(node.inputs) == sorted((x, gate.outputs[0])):
                dropped.add(gate.outputs[0])
                result.append(Node(_GATES[gate.op], (x,), node.outputs, gate.attributes))
                continue
        result.append(node)
    return [node for node in result if not (node.outputs[0] in dropped and node.op in _GATES)]
