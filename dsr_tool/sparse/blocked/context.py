"""The context in which the steps of a network are built, and the step that calls torch as the network does."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from dsr_tool.sparse.blocked.operations import AUGMENTED, called_name, in_place_argument, names_a_write
from dsr_tool.sparse.blocked.plans import Plans
from dsr_tool.sparse.blocked.trace import Graph, sparse_names
from dsr_tool.sparse.blocked.values import Registers, Value, plain
from dsr_tool.sparse.compact.rebuild import light
from dsr_tool.sparse.compact.store import CompactStore

__all__ = ["Context", "Run", "reader", "torch_step"]

Run: TypeAlias = Callable[[Registers], None]
"""A step: reads registers and writes those of its nodes."""


@dataclass
class Context:
    """The network as builders of steps know it.

    Attributes:
        root: the network.
        store: its sparse weights.
        plans: plans of the kernels.
        graph: the traced network.
        places: the register of each node.
    """

    root: nn.Module
    store: CompactStore
    plans: Plans
    graph: Graph
    places: dict[fx.Node, int]

    def module(self, node: fx.Node) -> nn.Module:
        """Returns the module that a node calls."""
        return self.graph.modules[str(node.target)]

    def place(self, argument: Any) -> int | None:
        """Returns the register of an argument of a node; None if it is a constant."""
        return self.places[argument] if isinstance(argument, fx.Node) else None


def torch_step(node: fx.Node, context: Context) -> Run:
    """Returns the step that does what a node says, on rows of images, without writing into its arguments."""
    out = context.places[node]
    if node.op == "get_attr":
        return _attribute_step(str(node.target), out, context)
    call, args, kwargs, copies = _separate(node, context)
    read_args, read_kwargs = reader(args, context.places), reader(kwargs, context.places)
    opaque = node.op == "call_module" and str(node.target) in context.graph.notes
    around = light if node.op == "call_module" and any(map(sparse_names, context.module(node).modules())) else None

    def run(registers: Registers) -> None:
        given = read_args(registers)
        if copies:
            given = (given[0].clone(), *given[1:])
        with around() if around else nullcontext():
            registers[out] = call(*given, **read_kwargs(registers))

    return _watched(run, node, context) if opaque else run


def _attribute_step(name: str, out: int, context: Context) -> Run:
    if name in context.graph.tensors:
        constant = context.graph.tensors[name]

        def run_constant(registers: Registers) -> None:
            registers[out] = constant

        return run_constant
    path, _, attribute = name.rpartition(".")
    owner = context.root.get_submodule(path)

    def run(registers: Registers) -> None:
        registers[out] = getattr(owner, attribute)

    return run


def _separate(node: fx.Node, context: Context) -> tuple[Callable[..., Any], Any, Any, bool]:
    """Returns what a node calls, changed so that it writes into nothing: function, arguments, and whether to copy."""
    args, kwargs = tuple(node.args), dict(node.kwargs)
    if node.op == "call_module":
        module = context.module(node)
        return module, args, kwargs, getattr(module, "inplace", False) is True
    name = called_name(node)
    base, writes = name.removesuffix("_"), names_a_write(name) and not node.meta.get("writes")
    if node.op == "call_method":
        method = base if writes and hasattr(Tensor, base) else name
        return _method(method), args, kwargs, writes and method == name
    target: Any = node.target
    if writes:
        other = getattr(functional, base, None) or getattr(torch, base, None)
        return other or target, args, kwargs, other is None
    if target in AUGMENTED and not node.meta.get("writes"):
        return AUGMENTED[target], args, kwargs, False
    if in_place_argument(node) is True:
        if "inplace" in kwargs:
            return target, args, kwargs | {"inplace": False}, False
        return target, args, kwargs, True
    return target, args, kwargs, False


def _method(name: str) -> Callable[..., Any]:
    def call(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(tensor, name)(*args, **kwargs)

    return call


def _watched(run: Run, node: fx.Node, context: Context) -> Run:
    """Returns a step that notices when a module wrote into the rows of a value."""
    places = [context.places[each] for each in node.all_input_nodes]

    def watching(registers: Registers) -> None:
        values = [held for held in map(registers.__getitem__, places) if type(held) is Value]
        before = [_version(value.rows) for value in values]
        run(registers)
        for value, version in zip(values, before, strict=True):
            if _version(value.rows) != version:
                value.written()

    return watching


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def reader(argument: Any, places: dict[fx.Node, int]) -> Callable[[Registers], Any]:
    """Returns a function that puts an argument of a node together from the registers, with values as rows."""
    if isinstance(argument, fx.Node):
        place = places[argument]

        def read(registers: Registers) -> Any:
            held = registers[place]
            return held if isinstance(held, Tensor) else plain(held)

        return read
    if isinstance(argument, slice):
        parts = [reader(part, places) for part in (argument.start, argument.stop, argument.step)]
        return lambda registers: slice(*(part(registers) for part in parts))
    if isinstance(argument, dict):
        read_values = {key: reader(each, places) for key, each in argument.items()}
        return lambda registers: {key: each(registers) for key, each in read_values.items()}
    if isinstance(argument, (list, tuple)) and argument:
        items = [reader(each, places) for each in argument]
        if len(items) == 1 and type(argument) is tuple:
            (first,) = items
            return lambda registers: (first(registers),)
        kind = tuple if isinstance(argument, tuple) else list
        return lambda registers: kind([each(registers) for each in items])
    return lambda _: argument
