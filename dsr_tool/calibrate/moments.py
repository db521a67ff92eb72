"""Moments: mean and variance of the input of every convolution and linear layer, derived from the weights alone.

The graph is walked once with signals in place of values (see `signals`). Where a norm's statistics were never measured,
it says nothing of its output, and the moments before it are carried on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from dsr_tool.calibrate.moment_layers import Linear
from dsr_tool.calibrate.moment_rules import (
    Value,
    computed,
    elementwise,
    fractions,
    moved,
    normalised,
    own_statistics,
    product_shape,
    shape_of,
    whole,
)
from dsr_tool.calibrate.paths import Paths, Step
from dsr_tool.calibrate.signals import Float, Signal, Unknown, root_window
from dsr_tool.errors import DsrError, first_line
from dsr_tool.graph.ir import Graph, Node
from dsr_tool.graph.operators import operator_of
from dsr_tool.runtime.reference.interpreter import live_nodes
from dsr_tool.sparse.in_file import values_of
from dsr_tool.sparse.trace import trace

__all__ = ["InputMoments", "Moments", "input_moments", "untrained"]


@dataclass(frozen=True, eq=False)
class Moments:
    """Distribution of the input of one layer, and where its output goes.

    Attributes:
        mean: expected value per input channel of the layer, shape (inputs,).
        variance: variance per input channel, in the same shape.
        groups: number of groups of a convolution; 1 for linear layers.
        transposed: whether the weight has its inputs in the first dimension, as those of transposed convolutions.
        norm: state_dict names of scale, shift, mean and variance of the batch norm that alone reads the output.
        bias: state_dict name of the layer's bias.
        measured: whether the norm's statistics were measured, and not folded or left at mean 0 and variance 1.
    """

    mean: Float
    variance: Float
    groups: int = 1
    transposed: bool = False
    norm: tuple[str, ...] | None = None
    bias: str | None = None
    measured: bool = False


class InputMoments(dict[str, Moments | str]):
    """For each weight by name the moments of its layer's input, or in words why they are not known.

    Attributes:
        paths: how the layers' outputs reach the network's output.
    """

    def __init__(self, moments: Mapping[str, Moments | str], paths: Paths) -> None:
        super().__init__(moments)
        self.paths = paths


def input_moments(module: nn.Module, input_shape: tuple[int, ...], graph: Graph | None = None) -> InputMoments:
    """Derives the moments of the input of every convolution and linear layer.

    The network's own input is taken as normalised: mean 0 and variance 1 in every channel, as pictures have about.

    Args:
        module: the network with its trained weights; it does not change.
        input_shape: shape of one input, without the batch dimension.
        graph: the graph of the module; captured here when absent.

    Returns:
        The moments of each layer. Weights that the outputs do not depend on are missing.

    Raises:
        UsageError: the module cannot be captured with this input shape.
    """
    graph = graph or trace(module, input_shape)
    walk, steps = _Walk(graph, values_of(module)), []
    with np.errstate(all="ignore"):
        outputs = tuple(value.name for value in graph.outputs)
        for node, release in live_nodes(graph.nodes, outputs):
            steps.append(walk.visit(node))
            walk.forget(release)
    return InputMoments(walk.found, Paths(tuple(step for step in steps if step.inputs), outputs))


def untrained(state: Mapping[str, torch.Tensor]) -> list[str]:
    """Returns the batch norms, by module path, whose statistics are those of a new network: mean 0 and variance 1."""
    means = (name for name in state if name.endswith("running_mean"))
    paths = (name.rpartition(".")[0] for name in means)
    return [path for path in paths if _is_new(state[f"{path}.running_mean"], state[f"{path}.running_var"])]


def _is_new(mean: torch.Tensor, variance: torch.Tensor) -> bool:
    return not bool(mean.any()) and bool((variance == 1).all())


class _Walk:
    """Visits the nodes of a graph in order.

    Attributes:
        found: moments, or a reason, by weight name.
    """

    def __init__(self, graph: Graph, state: Mapping[str, torch.Tensor]) -> None:
        self.found: dict[str, Moments | str] = {}
        self._uses: dict[str, int] = {}
        self._state, self._users = state, graph.users()
        self._makers = {name: node for node in graph for name in node.outputs}
        self._values: dict[str, Value] = dict(graph.constants)
        image = graph.inputs[0]
        shape = (1, *(size or 1 for size in image.shape[1:]))
        self._values[image.name] = Signal(shape, np.zeros([1] * len(shape)), np.ones([1] * len(shape)))

    def visit(self, node: Node) -> Step:
        """Derives the outputs of a node, records the input of a layer, and returns what the node does on paths."""
        inputs = [self._value(name) for name in node.inputs]
        try:
            outputs = self._outputs(node, inputs)
        except (DsrError, LookupError, ValueError) as error:
            reason = f"is behind an operator {node.op} that moments do not pass ({first_line(error)[:80]})"
            outputs = [Unknown((), reason) for _ in node.outputs]
        self._values.update((name, value) for name, value in zip(node.outputs, outputs, strict=False) if name)
        return self._step(node, inputs)

    def _step(self, node: Node, inputs: Sequence[Value | None]) -> Step:
        varying = [i for i, value in enumerate(inputs) if isinstance(value, Signal | Unknown)]
        weight = self.weight_of(node.inputs[1]) if operator_of(node.op).weights and len(varying) == 1 else ""
        parts = [1.0]
        joins = (operator_of(node.op).arithmetic and node.op != "Div") or node.op == "Concat"
        if joins and len(varying) > 1:
            shares = fractions(node.op, inputs)
            parts = [shares[i] for i in varying]
        names = tuple(node.inputs[i] for i in varying) if node.op != "Shape" else ()
        return Step(names, tuple(name for name in node.outputs if name), weight, tuple(parts))

    def forget(self, names: Iterable[str]) -> None:
        """Frees values that no later node reads."""
        for name in names:
            self._values.pop(name, None)

    def weight_of(self, name: str) -> str:
        """Returns the state_dict name of the weight that a value is a view of; empty if it is none."""
        while name not in self._state:
            node = self._makers.get(name)
            if node is None or not (operator_of(node.op).keeps_entries or operator_of(node.op).narrows):
                return ""
            name = node.inputs[0]
        return name

    def _value(self, name: str) -> Value | None:
        if name and name not in self._values:
            self._values[name] = self._state[name].detach().cpu().float().numpy()
        return self._values[name] if name else None

    def _outputs(self, node: Node, inputs: Sequence[Value | None]) -> Sequence[Value]:
        signals = [value for value in inputs if isinstance(value, Signal | Unknown)]
        if not signals or node.op == "Shape":
            return computed(node, [whole(value) for value in inputs])
        if operator_of(node.op).weights:
            return [self._layer(node, inputs)]
        if node.op == "BatchNormalization":
            return [normalised(node, inputs)]
        if operator_of(node.op).own_statistics:
            return [own_statistics(node, inputs)]
        if node.op == "MatMul":
            return [self._attention(node, inputs)]
        known = [value for value in signals if isinstance(value, Signal)]
        by_entry = operator_of(node.op).elementwise
        if len(known) < len(signals):
            (reason, *_) = (value.reason for value in signals if isinstance(value, Unknown))
            if by_entry:
                return [Unknown(np.broadcast_shapes(*map(shape_of, inputs)), reason)]
            return [Unknown(array.shape, reason) for array in computed(node, [whole(value) for value in inputs])]
        if by_entry:
            return [elementwise(node, inputs)]
        return moved(node, inputs)

    def _layer(self, node: Node, inputs: Sequence[Value | None]) -> Value:
        """Records the input of a convolution or linear layer, and derives its output."""
        source, weight = inputs[:2]
        name = self.weight_of(node.inputs[1]) if isinstance(weight, np.ndarray) else ""
        if not isinstance(source, Signal | Unknown) or not isinstance(weight, np.ndarray):
            return self._attention(node, inputs)
        layer = Linear.of(node, weight)
        shape = layer.shape(source.shape)
        if isinstance(source, Unknown):
            self._record(name, source.reason)
            return Unknown(shape, source.reason)
        mean, variance = source.along(1 if layer.convolution else -1)
        if layer.inputs % len(mean):
            raise ValueError(f"{len(mean)} channels do not fit {layer.inputs} inputs")
        # A linear layer on flattened pixels reads each channel several times in a row.
        mean, variance = (np.repeat(array, layer.inputs // len(array)) for array in (mean, variance))
        norm, reader = self._readers(node)
        measured = norm is not None and not _is_new(self._state[norm[2]], self._state[norm[3]])
        self._record(name, Moments(mean, variance, layer.groups, layer.transposed, norm, reader, measured))
        bias = inputs[2] if len(inputs) > 2 else None
        return layer.output(shape, mean, variance, bias if isinstance(bias, np.ndarray) else None)

    def _record(self, name: str, entry: Moments | str) -> None:
        before = self.found.get(name)
        if not name or isinstance(before, str):
            return
        self._uses[name] = self._uses.get(name, 0) + 1
        if isinstance(before, Moments) and isinstance(entry, Moments):
            # A layer that is used several times sees the mixture of its inputs, all uses alike.
            share, apart = 1 / self._uses[name], entry.mean - before.mean
            mean = before.mean + share * apart
            variance = (1 - share) * (before.variance + share * apart**2) + share * entry.variance
            norm = before.norm if before.norm == entry.norm else None
            entry = replace(before, mean=mean, variance=variance, norm=norm)
        self.found[name] = entry

    def _readers(self, node: Node) -> tuple[tuple[str, ...] | None, str | None]:
        """Returns the parameters of the norm that alone reads a layer, and the name of the layer's bias."""
        users = self._users.get(node.outputs[0], [])
        bias = node.inputs[2] if len(node.inputs) > 2 else ""
        if len(users) == 1 and users[0].op == "Add":
            bias = next((self.weight_of(name) for name in users[0].inputs if self.weight_of(name)), bias)
        norm = users[0].inputs[1:5] if len(users) == 1 and users[0].op == "BatchNormalization" else None
        return norm, bias if bias in self._state else None

    def _attention(self, node: Node, inputs: Sequence[Value | None]) -> Value:
        """Derives the product of two values: known for attention, whose rows are averages over tokens."""
        shape = product_shape(shape_of(inputs[0]), shape_of(inputs[1]))
        maker, values = self._makers.get(node.inputs[0]), inputs[1]
        if maker is None or maker.op != "Softmax" or not isinstance(values, Signal):
            return Unknown(shape, "is behind a product of two computed values")
        mean, variance = (
            np.broadcast_to(array, values.shape).mean(-2, keepdims=True) for array in (values.mean, values.variance)
        )
        return Signal(shape, mean, variance / root_window(values.shape[-2]))
