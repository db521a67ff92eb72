"""Writes in place, told as results: later readers of a tensor read what the write made of it.

Steps never write into their arguments. After `relu_(x)` the name x means the result, so every later use of x is
redirected to it. A write that another view of the same memory would show is refused.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx, nn

from dsr_tool.sparse.blocked.operations import called_name, writes_in_place
from dsr_tool.sparse.blocked.trace import Graph, NotTraceableError

__all__ = ["is_number", "redirect_writes"]

_VIEWS = frozenset({
    "view", "reshape", "flatten", "permute", "transpose", "swapaxes", "chunk", "split", "getitem", "squeeze",
    "unsqueeze", "expand", "narrow", "contiguous", "detach", "select", "movedim", "unflatten", "view_as", "t", "unbind",
    "Flatten", "Identity", "Unflatten", "Dropout", "Dropout2d", "dropout",
})  # fmt: skip
"""Names of what may return its argument's own memory."""
_NUMBERS = frozenset({"size", "dim", "ndimension", "numel", "stride", "nelement"})
_OF_NUMBERS = frozenset({
    "add", "sub", "mul", "floordiv", "truediv", "mod", "getitem", "neg", "eq", "ne", "lt", "le", "gt", "ge", "floor",
    "ceil", "sqrt", "iadd", "isub", "imul", "itruediv", "getattr",
})  # fmt: skip


def redirect_writes(graph: Graph) -> None:
    """Redirects later uses of what a node writes into to that node, and removes what nobody reads.

    A write into a parameter or a buffer stays one.

    Raises:
        NotTraceableError: if another view of the same memory is read afterwards.
    """
    graph.nodes = [node for node in graph.nodes if not _abandoned(node)]
    _remove_unread(graph)
    for node in graph.nodes:
        node.meta["number"] = _makes_number(node)
    order = {node: i for i, node in enumerate(graph.nodes)}
    memory = {node: _memory(node, graph.modules) for node in graph.nodes}
    for node in graph.nodes:
        target = node.args[0] if node.args else None
        if not isinstance(target, fx.Node) or is_number(target) or not writes_in_place(node, graph.modules):
            continue
        if memory[target].op == "get_attr":
            node.meta["writes"] = True
            continue
        for other in graph.nodes:
            if other not in (target, node) and memory[other] is memory[target] and _read_after(other, node, order):
                raise NotTraceableError(f"{target.name} is written in place while {other.name} shares its memory")
        _replace(graph, target, node, order)


def _replace(graph: Graph, target: fx.Node, node: fx.Node, order: Mapping[fx.Node, int]) -> None:
    # The trace's own output node comes last, and is replaced by `outputs`.
    after = len(order)
    target.replace_all_uses_with(node, delete_user_cb=lambda user: order.get(user, after) > order[node])
    graph.outputs = [node if each is target else each for each in graph.outputs]


def _read_after(other: fx.Node, node: fx.Node, order: Mapping[fx.Node, int]) -> bool:
    return any(
        order.get(user, len(order)) > order[node] and not is_number(user) for user in other.users if user != node
    )


def _abandoned(node: fx.Node) -> bool:
    """Returns whether a node was left by a module that could not be followed, and nobody else reads it."""
    return bool(node.meta.get("abandoned")) and all(_abandoned(user) for user in node.users)


def _remove_unread(graph: Graph) -> None:
    needed = []
    for node in reversed(graph.nodes):
        target = getattr(node.target, "__name__", node.target)
        free = node.op == "get_attr" or target in ("getattr", "getitem", *_NUMBERS)
        if free and not node.users:
            node.args = ()
            continue
        needed.append(node)
    graph.nodes = needed[::-1]


def _memory(node: fx.Node, modules: Mapping[str, nn.Module]) -> fx.Node:
    """Returns the node whose memory a node's result may lie in: its own, or that of what it is a view of."""
    while node.args and isinstance(node.args[0], fx.Node) and not is_number(node):
        name = called_name(node)
        if node.op == "call_module":
            name = type(modules[str(node.target)]).__name__
        if name not in _VIEWS and not (name == "getattr" and node.args[1:2] == ("data",)):
            break
        node = node.args[0]
    return node


def is_number(node: fx.Node) -> bool:
    """Returns whether a node's result is a number or a shape, as far as is known, and no tensor."""
    return bool(node.meta.get("number"))


def _makes_number(node: fx.Node) -> bool:
    name = called_name(node)
    if name in _NUMBERS:
        return node.op == "call_method"
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim", "dtype", "device", "requires_grad", "is_cuda", "layout")
    if name not in _OF_NUMBERS or node.op not in ("call_function", "call_method"):
        return False
    return bool(node.all_input_nodes) and all(map(is_number, node.all_input_nodes))
