"""Tracing: what a network computes, as a graph of torch.fx whose modules and parameters stay where they are.

A module whose own code cannot be followed becomes one node of the graph and is called as it is. Nothing of the network
changes while it is traced: no attribute, no buffer, no random state.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from dsr_tool.sparse.blocked.fingerprint import HOOKS
from dsr_tool.sparse.blocked.guard import Guard
from dsr_tool.sparse.blocked.operations import module_kind
from dsr_tool.sparse.compact.marks import LAYERS, plain_class
from dsr_tool.sparse.compact.store import CompactStore

__all__ = ["Graph", "NotTraceableError", "has_hooks", "sparse_names", "trace"]


class NotTraceableError(Exception):
    """Signals that a network as a whole cannot be traced; the text says why."""


@dataclass
class Graph:
    """A traced network.

    Attributes:
        nodes: the nodes in their order, without the output.
        inputs: those that stand for the tensors among the arguments.
        outputs: nodes, and constants, of the flattened result.
        result: how to put the result together.
        modules: the modules that nodes call, by name.
        tensors: constants that the network made for itself, by name.
        notes: modules that became one node, by name, and why.
    """

    nodes: list[fx.Node]
    inputs: list[fx.Node]
    outputs: list[Any]
    result: pytree.TreeSpec
    modules: dict[str, nn.Module]
    tensors: dict[str, Tensor]
    notes: dict[str, str]


def trace(module: nn.Module, store: CompactStore, arguments: Sequence[Any], spec: pytree.TreeSpec) -> Graph:
    """Returns the graph of a network in its present mode.

    Args:
        module: the root module, in compact storage or not.
        store: the store, whose dense weights nobody may read meanwhile.
        arguments: the flattened arguments of a call; tensors among them become inputs, the others constants.
        spec: how arguments are put together into (args, kwargs).

    Raises:
        NotTraceableError: if the network's own `forward` cannot be followed.
    """
    if "forward" in module.__dict__:
        raise NotTraceableError("its forward was replaced on the instance")
    tracer = _Tracer(module, arguments, spec)
    try:
        # Traced with gradients, so that a network's own `no_grad` shows.
        with store.tracing(), torch.inference_mode(False), torch.enable_grad(), _functions_refused():
            tracer.trace(module)
    except NotTraceableError:
        raise
    except Exception as error:
        raise NotTraceableError(_reason(error)) from error
    finally:
        restored = tracer.before.restore(module)
    if restored:
        raise NotTraceableError(restored)
    return tracer.finished()


def sparse_names(module: nn.Module) -> Mapping[str, str]:
    """Returns the names in the store of a module's own sparse weights, by attribute."""
    held: Mapping[str, str] = module.__dict__.get(LAYERS, {})
    return held


def has_hooks(module: nn.Module) -> bool:
    """Returns whether a module must be called itself, because somebody hooked on to that."""
    return any(getattr(module, name) for name in HOOKS)


class _Proxy(fx.Proxy):
    """A tensor in a trace: networks that ask whether it is one get the right answer."""

    _is_param = _is_buffer = False

    @property
    def __class__(self) -> type:
        return Tensor

    @__class__.setter
    def __class__(self, new: type) -> None:
        raise TypeError(f"a proxy does not become a {new}")

    # Without these, `x += y` would be recorded as a sum, and other names of x would keep the old value.
    def __iadd__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.iadd, other)

    def __isub__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.isub, other)

    def __imul__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.imul, other)

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.itruediv, other)

    def _in_place(self, function: Callable[[Any, Any], Any], other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})


class _Tracer(fx.Tracer):
    """Follows torch.nn's modules no further, nor those whose own code cannot be followed."""

    proxy_buffer_attributes = True

    def __init__(self, module: nn.Module, arguments: Sequence[Any], spec: pytree.TreeSpec) -> None:
        super().__init__(autowrap_modules=(math,))
        self._arguments, self._spec = arguments, spec
        self.before = Guard.of(module)
        self.inputs: list[fx.Node] = []
        self.outputs: list[Any] = []
        self.result: pytree.TreeSpec | None = None
        self.modules: dict[str, nn.Module] = {}
        self.tensors: dict[str, Tensor] = {}
        self.notes: dict[str, str] = {}

    def finished(self) -> Graph:
        """Returns the graph, once traced."""
        assert self.result is not None  # noqa: S101 - trace() has returned
        nodes = [node for node in self.graph.nodes if node.op != "output"]
        return Graph(nodes, self.inputs, self.outputs, self.result, self.modules, self.tensors, self.notes)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None  # noqa: ARG002
    ) -> tuple[Callable[[], list[fx.Proxy]], list[Any]]:  # fmt: skip
        """Returns a function without arguments that calls the network's own `forward` with proxies."""
        module, leaves = self.root, []
        forward = plain_class(module).forward
        for i, argument in enumerate(self._arguments):
            if isinstance(argument, Tensor):
                argument = self.create_proxy("placeholder", f"input_{i}", (), {})  # noqa: PLW2901
                self.inputs.append(argument.node)
            leaves.append(argument)
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)

        def run() -> list[fx.Proxy]:
            flat, self.result = pytree.tree_flatten(forward(module, *args, **kwargs))
            self.outputs = [leaf.node if isinstance(leaf, fx.Proxy) else leaf for leaf in flat]
            if odd := [type(leaf).__name__ for leaf in self.outputs if not isinstance(leaf, _RESULTS)]:
                raise NotTraceableError(f"it returns a {odd[0]}")
            return [leaf for leaf in flat if isinstance(leaf, fx.Proxy)]

        return run, []

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Returns the proxy of a node."""
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Returns whether a module is one node."""
        if module_qualified_name in self.notes:
            return True
        if has_hooks(m):
            self.notes[module_qualified_name] = "it has hooks"
            return True
        kind = plain_class(m)
        torchs = kind.__module__.startswith(("torch.nn", "torch.ao.nn")) and not isinstance(m, nn.Sequential)
        own = torchs or module_kind(m) is not None
        if not own and sparse_names(m):
            self.notes[module_qualified_name] = f"{kind.__name__} reads its sparse weight itself"
        return own or bool(sparse_names(m))

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Follows a module, or records a call of it if that fails or would not be the same."""
        path = self.path_of_module(m)
        if not self.is_leaf_module(m, path):
            before, depth = Guard.of(m), (dict(self.module_stack), self.scope.module_path, self.scope.module_type)
            made = len(self.graph.nodes)
            try:
                result = super().call_module(m, forward, args, kwargs)
                reason = before.restore(m)
            except Exception as error:  # noqa: BLE001 - the network's own code ran
                reason = before.restore(m) or _reason(error)
                self._leave(depth)
            if not reason:
                return result
            self.notes[path] = reason
            for node in list(self.graph.nodes)[made:]:
                node.meta["abandoned"] = True
        self.modules[path] = m
        return self.create_proxy("call_module", path, args, kwargs)

    def _leave(self, depth: tuple[dict[str, Any], str, Any]) -> None:
        """Returns to the module in which a failed one was called."""
        stack, self.scope.module_path, self.scope.module_type = depth
        self.module_stack.clear()
        self.module_stack.update(stack)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Records a node, and whether the network switched gradients off around it."""
        if torch.is_autocast_enabled("cpu"):
            raise NotTraceableError("it switches autocast on itself")
        node = super().create_node(*args, **kwargs)
        node.meta["grad"] = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        return node

    def create_arg(self, a: Any) -> Any:
        """Returns an argument of a node; tensors that the network made become constants outside of it."""
        if isinstance(a, fx.Proxy):
            return a.node
        if type(a) is Tensor and not any(a is buffer for buffer in self.root.buffers()):
            name = next((name for name, tensor in self.tensors.items() if tensor is a), f"constant {len(self.tensors)}")
            self.tensors[name] = a
            return self.create_node("get_attr", name, (), {})
        return super().create_arg(a)


_RESULTS = (fx.Node, int, float, bool, str, type(None))


_REASONS = {
    "inputs to control flow": "its control flow depends on values",
    "Proxy object cannot be iterated": "it takes a tensor apart in a loop",
    "'len' is not supported": "it asks for the length of a tensor",
    "not '_Proxy'": "it turns a tensor into a Python number",
    "'_Proxy' object cannot be interpreted as an integer": "it counts by the shape of a tensor",
}
"""Parts of messages of torch.fx and Python, whose advice is for those who trace, and what they mean for a network."""


def _reason(error: Exception) -> str:
    text = (str(error) or type(error).__name__).splitlines()[0]
    return next((reason for part, reason in _REASONS.items() if part in text), text)


@contextmanager
def _functions_refused() -> Iterator[None]:
    """Refuses autograd Functions, whose backward a tracer would lose."""
    known = torch.autograd.Function.__dict__["apply"]

    def refused(cls: type, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves((args, kwargs))):
            raise NotTraceableError(f"it uses the autograd function {cls.__name__}")
        return known.__get__(None, cls)(*args, **kwargs)

    torch.autograd.Function.apply = classmethod(refused)
    try:
        yield
    finally:
        torch.autograd.Function.apply = known
