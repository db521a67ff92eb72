"""Splits a module into consecutive stages, so that a pass over pictures can go on from kept values.

The stages come from `torch.fx`. A submodule that cannot be traced is one indivisible call; a network whose own forward
cannot be traced is one stage. The module's own submodules and parameters compute, so changed weights are seen at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from dsr_tool.calibrate.stages import Stage, cut, names_of, traced
from dsr_tool.errors import UsageError, first_line
from dsr_tool.sparse.feeding import evaluating

__all__ = ["Segments", "Values", "kept", "used"]

Values = dict[str, object]
"""Values that live between two stages, by name: tensors of a batch, sizes, tuples of these."""

_MOST_VALUES = 1 << 20
"""Default of the most floats per picture that live at a cut. ResNet-50 at 224 px has 0.8 M between its first blocks."""


class Segments:
    """A module as consecutive stages.

    Attributes:
        module: the network itself.
        stage_of: number of the stage that first uses a parameter or buffer, by its name.
    """

    def __init__(self, module: nn.Module, graph: fx.Graph | None, stages: Sequence[Stage], channels_last: bool) -> None:
        """Takes what `of` found."""
        self.module, self._stages, self._channels_last = module, stages, channels_last
        # Made once: it walks over all submodules, which takes as long as a stage of one small batch.
        self._interpreter = None if graph is None else fx.Interpreter(module, garbage_collect_values=False, graph=graph)
        self._names = [names_of(module, stage) for stage in stages]
        self.stage_of = {name: number for number in reversed(range(len(stages))) for name in self._names[number]}

    def __len__(self) -> int:
        return len(self._stages)

    @classmethod
    def of(cls, module: nn.Module, example: torch.Tensor, *, most_values: int = _MOST_VALUES) -> Segments:
        """Splits a module before every layer of weights where few values live.

        Args:
            module: any network that takes one tensor; it stays as it is.
            example: a batch of one or two inputs, shape (batch, *input_shape).
            most_values: most floats per picture that may live at a cut.

        Returns:
            The stages; a single one if the module cannot be traced, or if its stages compute something else.

        Raises:
            UsageError: the module does not take the example.
        """
        with evaluating(module):
            expected, channels_last = _expected(module, example)
            graph = traced(module)
            if graph is not None:
                with contextlib.suppress(Exception):  # whatever a module does that a trace cannot repeat
                    found = cls(module, graph, cut(module, graph, example, most_values), channels_last)
                    if _agree(found.run(found.begin(example)), expected):
                        return found
            return cls(module, None, [Stage((), frozenset({"output"}))], channels_last)

    def begin(self, pictures: torch.Tensor) -> Values:
        """Returns the values before the first stage, for a batch of inputs."""
        # Channels last halves the time of a pass; the weights may stay as they are.
        if self._channels_last:
            pictures = pictures.contiguous(memory_format=torch.channels_last)
        return {self._input: pictures}

    def names(self, stage: int) -> frozenset[str]:
        """Returns the names of the parameters and buffers that a stage uses."""
        return self._names[stage]

    @property
    def _input(self) -> str:
        if self._interpreter is None:
            return "input"
        return str(next(node.name for node in self._interpreter.graph.nodes if node.op == "placeholder"))

    def advance(self, stage: int, values: Values) -> Values:
        """Runs one stage on the values before it and returns those after it; `values` are left as they are.

        Tensors among them may be changed in place by the module; give `used` values where they are needed again.
        """
        if self._interpreter is None:
            return {"output": self.module(values["input"])}
        interpreter = self._interpreter
        nodes = self._stages[stage].nodes
        last_use = {source: node for node in nodes for source in node.all_input_nodes}
        environment: dict[fx.Node, Any] = {n: values[n.name] for n in interpreter.graph.nodes if n.name in values}
        interpreter.env = environment
        for node in nodes:
            for source in node.all_input_nodes:
                if source.op == "get_attr":  # fetched at every use: never a value that is kept
                    environment[source] = interpreter.run_node(source)
            if node.op != "placeholder":
                environment[node] = interpreter.run_node(node)
            elif node not in environment:  # an argument with a default
                environment[node] = node.args[0] if node.args else None
            for source in node.all_input_nodes:
                if last_use[source] is node and source.name not in self._stages[stage].live:
                    environment.pop(source, None)
        interpreter.env = {}
        return {node.name: value for node, value in environment.items() if node.name in self._stages[stage].live}

    def run(self, values: Values, start: int = 0) -> object:
        """Returns the module's output from the values before stage `start`."""
        for stage in range(start, len(self)):
            values = self.advance(stage, values)
        return values["output"]


def kept(values: Values, half: bool) -> Values:
    """Returns values to keep, in half precision where that is asked for and no value is too large for it."""

    def smaller(tensor: torch.Tensor) -> torch.Tensor:
        if not half or tensor.dtype != torch.float32:
            return tensor
        short = tensor.half()
        # The extremes are those of NaN and inf as well, and take a fifteenth of the time of looking at every value.
        return short if not short.numel() or bool(short.amax().isfinite() & short.amin().isfinite()) else tensor

    return {name: tree_map_only(torch.Tensor, smaller, value) for name, value in values.items()}


def used(values: Values) -> Values:
    """Returns copies of kept values in single precision, which a stage may change in place."""

    def whole(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.float() if tensor.dtype == torch.float16 else tensor.clone()

    return {name: tree_map_only(torch.Tensor, whole, value) for name, value in values.items()}


def _expected(module: nn.Module, example: torch.Tensor) -> tuple[object, bool]:
    """Returns the module's output, and whether it takes pictures channels last."""
    try:
        expected: object = module(example.clone())
    except Exception as error:  # a module may raise anything
        raise UsageError(
            f"{type(module).__name__} does not take inputs of shape {list(example.shape[1:])}: {first_line(error)}; "
            f"give pictures of another size."
        ) from error
    if example.dim() != 4:
        return expected, False
    try:
        return expected, _agree(module(example.contiguous(memory_format=torch.channels_last)), expected)
    except RuntimeError:  # a module that takes a view of its input
        return expected, False


def _agree(first: object, second: object) -> bool:
    """Returns whether two outputs are equal up to rounding."""
    ours, theirs = tree_leaves(first), tree_leaves(second)
    pairs = zip(ours, theirs, strict=True)
    return len(ours) == len(theirs) and all(
        a.shape == b.shape
        and torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-3 * float(b.abs().float().mean() + 1))
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
        else type(a) is type(b)
        for a, b in pairs
    )
