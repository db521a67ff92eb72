"""Traces a network with `torch.fx`, and cuts the trace into consecutive stages where few values live."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

__all__ = ["Stage", "cut", "names_of", "traced"]

_IN_PLACE: dict[object, object] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}
"""Python's in-place operators and those that leave their operands as they are."""


@dataclass(frozen=True)
class Stage:
    """Consecutive nodes of the traced graph.

    Attributes:
        nodes: the nodes in order; none if the stage is the whole module.
        live: names of the values that later stages read.
    """

    nodes: tuple[fx.Node, ...]
    live: frozenset[str]


class _Tracer(fx.Tracer):
    """Traces as deep as it can: a submodule that cannot be traced becomes one call."""

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Traces the inside of `m`, or records one call of it."""
        before = len(self.graph.nodes)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:  # noqa: BLE001 - a module may raise anything at a proxy
            for node in reversed(list(self.graph.nodes)[before:]):
                self.graph.erase_node(node)
            return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)


def traced(module: nn.Module) -> fx.Graph | None:
    """Returns the module's graph without in-place operators of Python; None if its forward cannot be traced."""
    try:
        graph = _Tracer().trace(module)
    except Exception:  # noqa: BLE001 - a module may raise anything at a proxy
        return None
    for node in graph.nodes:
        if node.op == "call_function":
            node.target = _IN_PLACE.get(node.target, node.target)
    return graph


def cut(module: nn.Module, graph: fx.Graph, example: torch.Tensor, most_values: int) -> list[Stage]:
    """Returns the stages of a graph: they start before layers of weights where at most `most_values` live."""
    nodes = [node for node in graph.nodes if node.op != "get_attr"]
    place = {node: i for i, node in enumerate(nodes)}
    last_use = {node: max((place[user] for user in node.users), default=-1) for node in nodes}
    sizes = _sizes(module, graph, example)
    layers = _layers(module, nodes)
    bounds = {0: frozenset[str](), len(nodes): frozenset({"output"})}
    for i in layers[1:]:
        # A layer that is called again must be in one stage with its first call.
        again = any(a < i <= b for a, b in _repeats(nodes, layers))
        live = [node for node in nodes[:i] if last_use[node] >= i]
        if not again and sum(sizes[node] for node in live) <= most_values:
            bounds[i] = frozenset(node.name for node in live)
    ends = sorted(bounds)
    return [Stage(tuple(nodes[a:b]), bounds[b]) for a, b in pairwise(ends)]


def _layers(module: nn.Module, nodes: Sequence[fx.Node]) -> list[int]:
    """Returns the indices of the nodes that use weights."""
    heavy = {name.rpartition(".")[0] for name, parameter in module.named_parameters() if parameter.dim() > 1}
    found = []
    for i, node in enumerate(nodes):
        inside = node.op == "call_module" and any(_below(path, str(node.target)) for path in heavy)
        # Weights that a function reads are fetched by `get_attr`; such a function is a layer as well.
        if inside or any(source.op == "get_attr" for source in node.all_input_nodes):
            found.append(i)
    return found


def _repeats(nodes: Sequence[fx.Node], layers: Sequence[int]) -> list[tuple[int, int]]:
    """Returns the first and last index of every layer that is used several times."""
    uses: dict[str, list[int]] = {}
    for i in layers:
        names = [str(source.target) for source in nodes[i].all_input_nodes if source.op == "get_attr"]
        for name in [str(nodes[i].target)] if nodes[i].op == "call_module" else names:
            uses.setdefault(name, []).append(i)
    return [(indices[0], indices[-1]) for indices in uses.values() if len(indices) > 1]


def _sizes(module: nn.Module, graph: fx.Graph, example: torch.Tensor) -> dict[fx.Node, int]:
    """Returns the floats per picture of every node's value."""
    sizes: dict[fx.Node, int] = {}

    class Sizer(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:  # its name in torch
            value = super().run_node(n)
            tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
            sizes[n] = sum(tensor.numel() for tensor in tensors) // len(example)
            return value

    Sizer(module, graph=graph).run(example.clone())
    return sizes


def _below(path: str, module: str) -> bool:
    """Returns whether a module's path lies in another module, or is it."""
    return path == module or path.startswith(f"{module}.")


def names_of(module: nn.Module, stage: Stage) -> frozenset[str]:
    """Returns the names of the parameters and buffers that a stage uses; all of them for the whole module."""
    names = [name for tensors in (module.named_parameters(), module.named_buffers()) for name, _ in tensors]
    if not stage.nodes:
        return frozenset(names)
    # Weights that a function reads are fetched by nodes outside the stage.
    nodes = {*stage.nodes, *(source for node in stage.nodes for source in node.all_input_nodes)}
    targets = {
        str(node.target)
        for node in nodes
        if node.op == "get_attr" or (node in stage.nodes and node.op == "call_module")
    }
    return frozenset(name for name in names if _prefixes(name) & targets)


def _prefixes(name: str) -> set[str]:
    """Returns a parameter's name and the paths of all modules around it."""
    parts = name.split(".")
    return {".".join(parts[: i + 1]) for i in range(len(parts))}
