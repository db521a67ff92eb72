"""Splits a module into consecutive stages, so that a pass over pictures can go on from kept values.

The stages come from `torch.fx`. A submodule that cannot be traced is one indivisible call; a network whose own forward
cannot be traced is one stage. The module's own submodules and parameters compute, so changed weights are seen at once.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from dsr_tool.errors import UsageError, first_line

__all__ = ["Segments", "Values", "evaluating", "kept", "used"]

Values = dict[str, object]
"""What lives between two stages, by name: tensors of a batch, sizes, tuples of these."""

_MOST_VALUES = 1 << 20
"""Default of the most floats per picture that live at a cut. ResNet-50 at 224 px has 0.8 M between its first blocks."""

_IN_PLACE: dict[object, object] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}
"""Python's in-place operators and those that leave their operands as they are."""


@dataclass(frozen=True)
class _Stage:
    """Consecutive nodes of the traced graph.

    Attributes:
        nodes: the nodes in order; none if the stage is the whole module.
        live: names of the values that later stages read.
    """

    nodes: tuple[fx.Node, ...]
    live: frozenset[str]


class Segments:
    """A module as consecutive stages.

    Attributes:
        module: the network itself.
        stage_of: number of the stage that first uses a parameter or buffer, by its name.
    """

    def __init__(
        self, module: nn.Module, graph: fx.Graph | None, stages: Sequence[_Stage], channels_last: bool
    ) -> None:
        """Takes what `of` found."""
        self.module, self._graph, self._stages, self._channels_last = module, graph, stages, channels_last
        self._names = [_names(module, stage) for stage in stages]
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
            graph = _trace(module)
            if graph is not None:
                with contextlib.suppress(Exception):  # whatever a module does that a trace cannot repeat
                    found = cls(module, graph, _cut(module, graph, example, most_values), channels_last)
                    if _agree(found.run(found.begin(example)), expected):
                        return found
            return cls(module, None, [_Stage((), frozenset({"output"}))], channels_last)

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
        if self._graph is None:
            return "input"
        return str(next(node.name for node in self._graph.nodes if node.op == "placeholder"))

    def advance(self, stage: int, values: Values) -> Values:
        """Runs one stage on the values before it and returns those after it; `values` are left as they are.

        Tensors among them may be changed in place by the module; give `used` values where they are needed again.
        """
        if self._graph is None:
            return {"output": self.module(values["input"])}
        interpreter = fx.Interpreter(self.module, garbage_collect_values=False, graph=self._graph)
        nodes = self._stages[stage].nodes
        last_use = {source: node for node in nodes for source in node.all_input_nodes}
        environment: dict[fx.Node, Any] = {n: values[n.name] for n in self._graph.nodes if n.name in values}
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
        return {node.name: value for node, value in environment.items() if node.name in self._stages[stage].live}

    def run(self, values: Values, start: int = 0) -> object:
        """Returns the module's output from the values before stage `start`."""
        for stage in range(start, len(self)):
            values = self.advance(stage, values)
        return values["output"]


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Puts a module into eval mode without gradients, and gives every flag back."""
    training = {child: child.training for child in module.modules()}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    # The fused attention of eval mode hides the products with the projections.
    torch.backends.mha.set_fastpath_enabled(False)
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for child, mode in training.items():
            child.training = mode


def kept(values: Values, half: bool) -> Values:
    """Returns values to keep, in half precision where that is asked for and no value is too large for it."""

    def smaller(tensor: torch.Tensor) -> torch.Tensor:
        if not half or tensor.dtype != torch.float32:
            return tensor
        short = tensor.half()
        return short if short.isfinite().all() else tensor

    return {name: tree_map_only(torch.Tensor, smaller, value) for name, value in values.items()}


def used(values: Values) -> Values:
    """Returns copies of kept values in single precision, which a stage may change in place."""

    def whole(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.float() if tensor.dtype == torch.float16 else tensor.clone()

    return {name: tree_map_only(torch.Tensor, whole, value) for name, value in values.items()}


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


def _trace(module: nn.Module) -> fx.Graph | None:
    """Returns the module's graph without in-place operators of Python; None if its forward cannot be traced."""
    try:
        graph = _Tracer().trace(module)
    except Exception:  # noqa: BLE001 - a module may raise anything at a proxy
        return None
    for node in graph.nodes:
        if node.op == "call_function":
            node.target = _IN_PLACE.get(node.target, node.target)
    return graph


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


def _cut(module: nn.Module, graph: fx.Graph, example: torch.Tensor, most_values: int) -> list[_Stage]:
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
    return [_Stage(tuple(nodes[a:b]), bounds[b]) for a, b in pairwise(ends)]


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


def _names(module: nn.Module, stage: _Stage) -> frozenset[str]:
    """Returns the names of the parameters and buffers that a stage uses; all of them for the whole module."""
    names = [name for tensors in (module.named_parameters(), module.named_buffers()) for name, _ in tensors]
    if not stage.nodes:
        return frozenset(names)
    # Those that a function reads are fetched by nodes outside the stage.
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
