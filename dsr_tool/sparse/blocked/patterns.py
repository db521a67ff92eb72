"""Groups of nodes that one kernel runs: norm, sum and activation; sum and activation."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import cast

from torch import fx, nn

from dsr_tool.sparse.blocked.elementwise import activation_of
from dsr_tool.sparse.blocked.operations import module_kind, operation_of
from dsr_tool.sparse.blocked.trace import Graph

__all__ = ["Group", "grouped"]


@dataclass
class Group:
    """Nodes that run as one step, at the place of the last one.

    Attributes:
        nodes: the nodes in their order.
        norm: the batch norm among them, or None.
        operands: the two nodes of the sum among them, or None.
        activation: name and slope of the activation, or None.
    """

    nodes: list[fx.Node]
    norm: fx.Node | None = None
    operands: tuple[fx.Node, fx.Node] | None = None
    activation: tuple[str, float] | None = None

    @property
    def residual(self) -> fx.Node | None:
        """The node that is added to the norm, or None."""
        if self.operands is None:
            return None
        one, other = self.operands
        return other if one is self.norm else one


def grouped(graph: Graph) -> list[Group]:
    """Returns the nodes of a graph in groups, each after those that it reads; inputs are left out."""
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    nodes, taken = [node for node in graph.nodes if node.op != "placeholder"], set[fx.Node]()
    groups: dict[fx.Node, Group] = {}
    for node in nodes:
        if node not in taken:
            group = _group(node, graph, taken, calls)
            taken.update(group.nodes)
            groups[group.nodes[-1]] = group
    return [groups[node] for node in nodes if node in groups]


def _group(node: fx.Node, graph: Graph, taken: set[fx.Node], calls: Counter[fx.node.Target]) -> Group:
    group = Group([node])
    if _is_norm(node, graph):
        group.norm = node
        # A norm that is called twice updates its statistics in the order of the calls.
        follower = _follower(node, graph, taken) if calls[node.target] == 1 else None
        if follower is not None and (operands := _sum(follower, graph)) and operands[0] is not operands[1]:
            group.nodes.append(follower)
            group.operands = operands
    else:
        group.operands = _sum(node, graph)
    if group.norm is None and group.operands is None:
        return group
    follower = _follower(group.nodes[-1], graph, taken)
    activation = activation_of(operation_of(follower, graph.modules)) if follower is not None else None
    if follower is not None and activation is not None:
        group.nodes.append(follower)
        group.activation = activation
    if group.norm is None and group.activation is None:
        group.operands = None
    return group


def _is_norm(node: fx.Node, graph: Graph) -> bool:
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
        return False
    if str(node.target) in graph.notes:
        return False
    return module_kind(graph.modules[str(node.target)]) in (nn.BatchNorm1d, nn.BatchNorm2d) and _with_history(node)


def _with_history(node: fx.Node) -> bool:
    return bool(node.meta.get("grad", True))


def _follower(node: fx.Node, graph: Graph, taken: set[fx.Node]) -> fx.Node | None:
    """Returns the only reader of a node, if it can run together with it."""
    users = list(node.users)
    if len(users) != 1 or node in graph.outputs or users[0] in taken or users[0].op == "output":
        return None
    hooked = users[0].op == "call_module" and str(users[0].target) in graph.notes
    return None if hooked or not _with_history(users[0]) or not _with_history(node) else users[0]


def _sum(node: fx.Node, graph: Graph) -> tuple[fx.Node, fx.Node] | None:
    operation = operation_of(node, graph.modules)
    if operation is None or operation.name != "add" or node.meta.get("number") or node.meta.get("writes"):
        return None
    operands = (operation.arguments["input"], operation.arguments["other"])
    if not all(isinstance(each, fx.Node) for each in operands):
        return None
    return cast(tuple[fx.Node, fx.Node], operands)
