"""Graph pass: fuses nodes that one kernel computes, before a graph is lowered.

Requires: nodes in topological order; each requested value is the first output of one of them.
Does: removes nodes that return their input (Identity, Dropout without a training mode), so that their readers read that
input; replaces the pair gate, x * gate(x) by one node (Swish, HardSwish) where nothing else reads the gate.
Ensures: the requested value is made under its name, with the same numbers up to rounding; the order stays topological;
no other value is made under a new name.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Container, Sequence

import numpy as np

from dsr_tool.graph.ir import Node
from dsr_tool.graph.operators import operator_of

__all__ = ["fuse"]


def fuse(nodes: Sequence[Node], known: Container[str], outputs: Container[str]) -> list[Node]:
    """Returns fewer nodes that compute the same; see the module's docstring.

    Args:
        nodes: the nodes that `outputs` depend on, in topological order.
        known: names of weights and constants.
        outputs: names of the requested values.
    """
    return _fuse_gates(_remove_identities(nodes, known, outputs), outputs)


def _remove_identities(nodes: Sequence[Node], known: Container[str], outputs: Container[str]) -> list[Node]:
    source: dict[str, str] = {}  # the output of a removed node -> what its readers read instead
    result = []
    for original in nodes:
        node = dataclasses.replace(original, inputs=tuple(source.get(name, name) for name in original.inputs))
        # A third input of Dropout says whether it trains, which has to be read first.
        identity = operator_of(node.op).identity and bool(node.inputs) and not any(node.inputs[2:])
        # One of a known value stays: it is folded, and folding frees the weight under its own name.
        if identity and node.inputs[0] not in known and node.outputs[0] not in outputs:
            source[node.outputs[0]] = node.inputs[0]
        else:
            result.append(node)
    return result


def _fuse_gates(nodes: Sequence[Node], outputs: Container[str]) -> list[Node]:
    readers = Counter(name for node in nodes for name in set(node.inputs))
    gates = {node.outputs[0]: node for node in nodes if _is_gate(node)}
    fused: dict[str, Node] = {}  # the output of a gate that is gone -> the node that computes it too
    for node in nodes:
        if node.op != "Mul" or len(node.inputs) != 2:
            continue
        for name, x in (node.inputs, node.inputs[::-1]):
            gate = gates.get(name)
            if gate is not None and gate.inputs == (x,) and readers[name] == 1 and name not in outputs:
                fused[name] = Node(operator_of(gate.op).gate_of, (x,), node.outputs)
                break
    replaced = {node.outputs[0]: node for node in fused.values()}
    return [replaced.get(node.outputs[0], node) for node in nodes if node.outputs[0] not in fused]


def _is_gate(node: Node) -> bool:
    """Returns whether x times this node is the operator that its row names, which has no attributes."""
    if not operator_of(node.op).gate_of or len(node.inputs) != 1:
        return False
    if node.op == "HardSigmoid":
        # HardSwish has a slope of 1/6, which exporters write rounded to float32; the default here is 0.2.
        alpha, beta = node.attributes.get("alpha", 0.2), node.attributes.get("beta", 0.5)
        return isinstance(alpha, float) and np.float32(alpha) == np.float32(1 / 6) and beta == 0.5
    return not node.attributes
