"""Graph pass: nodes that normalise the last axis step by step become one LayerNormalization.

Exporters of operator sets below 17 write one as mean, difference, square, mean, sum with epsilon, root, quotient,
factor and summand.

Requires: nodes in topological order; each requested value is the first output of one of them.
Does: replaces these nine nodes, or eight without the summand, where nothing else reads what they make in between and
factor and summand are known vectors.
Ensures: the same numbers up to rounding; the order stays topological; no value is made under a new name.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Sequence

from dsr_tool.graph.ir import Node
from dsr_tool.sparsity.tensor import Array

__all__ = ["fuse_norms"]

_Known = Callable[[str], Array | None]


def fuse_norms(nodes: Sequence[Node], known: _Known, outputs: Container[str]) -> list[Node]:
    """Returns fewer nodes that compute the same; see the module's docstring.

    Args:
        nodes: the nodes that `outputs` depend on, in topological order.
        known: returns a weight or constant by its name; None for any other name.
        outputs: names of the requested values.
    """
    finder = _Finder(nodes, known, outputs)
    replaced: dict[str, Node] = {}  # the output of the last node of a norm -> the norm
    gone: set[str] = set()
    for node in nodes:
        if node.op == "Div" and (found := finder.norm(node)) is not None:
            norm, inner = found
            replaced[norm.outputs[0]] = norm
            gone |= inner
    return [replaced.get(node.outputs[0], node) for node in nodes if node.outputs[0] not in gone]


class _Finder:
    """Follows a norm from its quotient to its input and to its result."""

    def __init__(self, nodes: Sequence[Node], known: _Known, outputs: Container[str]) -> None:
        self._known, self._outputs = known, outputs
        # With another number of inputs a node is invalid, and the reference says so.
        self._makers = {node.outputs[0]: node for node in nodes if len(node.inputs) == 1 + (node.op != "Sqrt")}
        self._readers: dict[str, list[Node]] = defaultdict(list)
        for node in nodes:
            for name in dict.fromkeys(node.inputs):
                self._readers[name].append(node)

    def norm(self, quotient: Node) -> tuple[Node, set[str]] | None:
        """Returns the norm that a quotient is part of, and the values that nothing reads then; None if it is none."""
        if len(quotient.inputs) != 2:
            return None
        difference, root = quotient.inputs
        shifted = self._made(self._input(root, "Sqrt"), "Add")
        variance, epsilon = self._split(shifted)
        square = self._made(self._mean_of(variance), "Pow", "Mul")
        centred = self._makers.get(difference)
        if shifted is None or square is None or centred is None or epsilon is None:
            return None
        if centred.op != "Sub" or not self._squares(square, difference):
            return None
        x, mean = centred.inputs
        factor = self._only_reader(quotient.outputs[0], "Mul")
        if self._mean_of(mean) != x or factor is None or epsilon.size != 1:
            return None
        _, scale = self._split(factor)
        if scale is None or scale.ndim != 1 or len(self._readers[difference]) != 2:
            return None
        inner = {mean, difference, square.outputs[0], variance, shifted.outputs[0], root, quotient.outputs[0]}
        between = inner - {difference}
        if any(len(self._readers[name]) != 1 for name in between) or any(name in self._outputs for name in inner):
            return None
        names, last = [x, self._name_of(factor)], factor
        summand = self._only_reader(factor.outputs[0], "Add")
        shift = None if summand is None else self._split(summand)[1]
        if summand is not None and shift is not None and shift.shape == scale.shape:
            names, last = [*names, self._name_of(summand)], summand
            inner.add(factor.outputs[0])
        attributes = {"axis": -1, "epsilon": float(epsilon.item())}
        return Node("LayerNormalization", tuple(names), last.outputs, attributes), inner

    def _made(self, name: str, *ops: str) -> Node | None:
        """Returns the node that makes a value, if it is one of these operators."""
        node = self._makers.get(name)
        return node if node is not None and node.op in ops else None

    def _input(self, name: str, op: str) -> str:
        """Returns what the operator that makes a value reads; empty if another operator makes it."""
        node = self._made(name, op)
        return "" if node is None else node.inputs[0]

    def _mean_of(self, name: str) -> str:
        """Returns the value whose mean over the last axis this is, with that axis kept; empty if it is none."""
        node = self._made(name, "ReduceMean")
        if node is None or not node.attributes.get("keepdims", 1):
            return ""
        axes = self._known(node.inputs[1])
        return node.inputs[0] if axes is not None and axes.tolist() == [-1] else ""

    def _squares(self, node: Node, name: str) -> bool:
        """Returns whether a node is the square of a value."""
        if node.inputs[0] != name:
            return False
        exponent = self._known(node.inputs[1])
        if node.op == "Mul":
            return node.inputs[1] == name
        return exponent is not None and exponent.size == 1 and exponent.item() == 2

    def _split(self, node: Node | None) -> tuple[str, Array | None]:
        """Returns the computed and the known operand of a node; None for one that has no known operand."""
        if node is None or len(node.inputs) != 2:
            return "", None
        for name, other in (node.inputs, node.inputs[::-1]):
            if (array := self._known(other)) is not None and self._known(name) is None:
                return name, array
        return "", None

    def _name_of(self, node: Node) -> str:
        """Returns the name of the known operand of a node."""
        computed, _ = self._split(node)
        return next(name for name in node.inputs if name != computed)

    def _only_reader(self, name: str, op: str) -> Node | None:
        """Returns the one node that reads a value, if it is this operator and the value is not requested."""
        readers = self._readers[name]
        return readers[0] if len(readers) == 1 and readers[0].op == op and name not in self._outputs else None
