"""A traced network as a list of steps over registers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from dsr_tool.runtime.kernels.train_planes import ACTIVATIONS
from dsr_tool.runtime.kernels.training import CALLS
from dsr_tool.sparse.blocked import elementwise, norms, shapes
from dsr_tool.sparse.blocked.attention import attention_step
from dsr_tool.sparse.blocked.context import Context, Run, reader, torch_step
from dsr_tool.sparse.blocked.coverage import Coverage, Where
from dsr_tool.sparse.blocked.layers import convolution_step, linear_step
from dsr_tool.sparse.blocked.mutation import redirect_writes
from dsr_tool.sparse.blocked.operations import module_kind, operation_of
from dsr_tool.sparse.blocked.patterns import Group, grouped
from dsr_tool.sparse.blocked.plans import Plans
from dsr_tool.sparse.blocked.trace import Graph, sparse_names
from dsr_tool.sparse.blocked.values import Registers, Value, detached, plain
from dsr_tool.sparse.blocked.window_attention import window_attention_step
from dsr_tool.sparse.compact.marks import plain_class
from dsr_tool.sparse.compact.store import CompactStore

__all__ = ["Program"]

_BUILDERS: dict[str, elementwise.Builder] = {
    **dict.fromkeys(ACTIVATIONS, elementwise.activation_step),
    **dict.fromkeys(elementwise.UNARY, elementwise.unary_step),
    **dict.fromkeys(elementwise.BINARY, elementwise.binary_step),
    **dict.fromkeys(shapes.REARRANGED, shapes.rearranged_step),
    **dict.fromkeys(shapes.ANSWERS, shapes.answer_step),
    **dict.fromkeys(("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d"), shapes.pool_step),
    "mean": shapes.mean_step,
    "cat": shapes.cat_step,
    "batch_norm": norms.function_step,
}  # fmt: skip
"""The builder of each operation's step; it gives None where torch must do it."""


class Step(NamedTuple):
    """One step.

    Attributes:
        run: what it does.
        ends: registers that nobody reads later.
        label: operation or module, for people.
        sparse: names of the sparse weights in it.
        out: register that it writes.
        constant: whether it only reads a parameter, a buffer or a constant.
    """

    run: Run
    ends: tuple[int, ...]
    label: str
    sparse: tuple[str, ...]
    out: int
    constant: bool


class Program:
    """A network in one mode, ready to run.

    Attributes:
        coverage: where its steps ran the first time; None before.
    """

    def __init__(self, root: nn.Module, store: CompactStore, plans: Plans, graph: Graph) -> None:
        """Builds the steps.

        Raises:
            NotTraceableError: if the graph writes into memory that others read.
        """
        redirect_writes(graph)
        places = {node: place for place, node in enumerate(graph.nodes)}
        self._context = context = Context(root, store, plans, graph, places)
        self._inputs = [places.get(node) for node in graph.inputs]
        self._read, self._result = reader(graph.outputs, places), graph.result
        self._single = graph.result.is_leaf()
        self._size = len(places)
        self._steps = self._built(grouped(graph), context)
        self._bare = [(step.run, step.ends) for step in self._steps]
        self.coverage: Coverage | None = None

    def __call__(self, tensors: Sequence[torch.Tensor]) -> Any:
        """Returns the network's result.

        Args:
            tensors: the tensors among the arguments, in order.
        """
        registers: Registers = [None] * self._size
        for place, tensor in zip(self._inputs, tensors, strict=True):
            if place is not None:
                registers[place] = tensor
        if self.coverage is None:
            self._observe(registers)
        else:
            for run, ends in self._bare:
                run(registers)
                for place in ends:
                    registers[place] = None
        results = self._read(registers)
        return results[0] if self._single else pytree.tree_unflatten(results, self._result)

    def _observe(self, registers: Registers) -> None:
        """Runs the steps, and notes where each one ran."""
        counts: list[tuple[Step, Where, int]] = []
        for step in self._steps:
            before = Counter(CALLS)
            step.run(registers)
            ran = Counter(CALLS) - before
            relayouts = ran.pop("dsr_block", 0) + ran.pop("dsr_unblock", 0)
            counts.append((step, _where(step, registers[step.out], bool(ran), relayouts), relayouts))
            for place in step.ends:
                registers[place] = None
        self.coverage = Coverage.of(
            [(step.label, step.sparse, where, relayouts) for step, where, relayouts in counts],
            self._context.graph.notes,
        )

    def _built(self, groups: list[Group], context: Context) -> list[Step]:
        built = [(group, _group_step(group, context)) for group in groups]
        last: dict[int, int] = {}
        for i, (group, _) in enumerate(built):
            for node in group.nodes:
                # What nobody reads ends where it is made.
                last[context.places[node]] = i
                for source in node.all_input_nodes:
                    last[context.places[source]] = i
        kept = {context.places[node] for node in _leaves(context.graph.outputs)}
        steps = []
        for i, (group, run) in enumerate(built):
            ends = tuple(place for place, at in last.items() if at == i and place not in kept)
            sparse = tuple(name for node in group.nodes for name in _sparse(node, context))
            first, out = group.nodes[0], context.places[group.nodes[-1]]
            steps.append(Step(run, ends, _label(first, context), sparse, out, first.op == "get_attr"))
        return steps


def _leaves(outputs: list[Any]) -> list[fx.Node]:
    return [each for each in outputs if isinstance(each, fx.Node)]


def _sparse(node: fx.Node, context: Context) -> list[str]:
    if node.op != "call_module":
        return []
    return [name for module in context.module(node).modules() for name in sparse_names(module).values()]


def _label(node: fx.Node, context: Context) -> str:
    operation = operation_of(node, context.graph.modules)
    if operation is not None:
        return operation.name
    if node.op == "call_module":
        return plain_class(context.module(node)).__name__
    return str(node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target))


def _where(step: Step, held: Any, kernels: bool, relayouts: int) -> Where:
    if kernels:
        return Where.KERNEL
    if step.constant:
        return Where.NUMBER
    values = held if isinstance(held, tuple) else (held,)
    if any(type(value) is Value and value.in_lanes for value in values) and not relayouts:
        return Where.LANES
    return Where.TORCH if any(isinstance(value, torch.Tensor) for value in values) or step.sparse else Where.NUMBER


def _group_step(group: Group, context: Context) -> Run:
    """Returns the step of a group: fused, or of its only node."""
    apart = [_without_gradients(_node_step(node, context), node, context) for node in group.nodes]
    if len(apart) == 1 and group.norm is None:
        return apart[0]
    out, activation = group.nodes[-1], group.activation or ("none", 0.01)
    if group.norm is not None:
        return norms.norm_step(
            group.norm, context, out=out, residual=group.residual, activation=activation, apart=apart
        )
    return elementwise.sum_step(cast(Any, group.operands), context, activation, out, apart)


def _node_step(node: fx.Node, context: Context) -> Run:
    step: Run | None = None
    if node.op == "call_module":
        step = _module_step(node, context)
    if step is None and (operation := operation_of(node, context.graph.modules)) and not node.meta.get("writes"):
        builder = _BUILDERS.get(operation.name)
        step = builder(operation, node, context, torch_step(node, context)) if builder else None
    return step or torch_step(node, context)


def _module_step(node: fx.Node, context: Context) -> Run | None:
    if str(node.target) in context.graph.notes:
        return window_attention_step(node, context)
    kind = module_kind(context.module(node))
    if kind is nn.Conv2d:
        return convolution_step(node, context)
    if kind is nn.Linear:
        return linear_step(node, context)
    if kind is nn.MultiheadAttention:
        return attention_step(node, context)
    if kind is nn.PReLU and len(node.args) == 1:
        return elementwise.prelu_step(node, context, torch_step(node, context))
    return None


def _without_gradients(run: Run, node: fx.Node, context: Context) -> Run:
    """Returns a step that keeps no history, if the network switched that off."""
    if node.meta.get("grad", True):
        return run
    out, sources = context.places[node], [context.places[each] for each in node.all_input_nodes]

    def running(registers: Registers) -> None:
        before = [registers[place] for place in sources]
        # A value must not remember a form that was made without a history.
        for place in sources:
            registers[place] = detached(registers[place])
        with torch.no_grad():
            run(registers)
        if type(registers[out]) is not Value:
            registers[out] = plain(registers[out])
        for place, held in zip(sources, before, strict=True):
            registers[place] = held

    return running
