"""The plan of a graph for inputs of one shape: ops for the kernels, and the reference where there is no kernel."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from dsr_tool.errors import UsageError
from dsr_tool.graph.fuse import fuse
from dsr_tool.graph.fuse_norms import fuse_norms
from dsr_tool.graph.ir import Graph, Node
from dsr_tool.graph.limits import claim, folding_limit, memory_limit, running_limit
from dsr_tool.runtime.compiler.constants import Constants
from dsr_tool.runtime.compiler.lowering import Lowering
from dsr_tool.runtime.compiler.machine import Machine
from dsr_tool.runtime.compiler.memory import PlanMemory, memory_of
from dsr_tool.runtime.compiler.program import FallbackStep, KernelStep
from dsr_tool.runtime.compiler.rules import RULES
from dsr_tool.runtime.compiler.summary import OpTime
from dsr_tool.runtime.coverage import Coverage, Fallback
from dsr_tool.runtime.reference.call import bind, fold
from dsr_tool.runtime.reference.interpreter import Folded, check_opset, for_caller, live_nodes
from dsr_tool.sparsity.tensor import Array, SparseTensor

__all__ = ["Plan"]


class Plan:
    """The outputs of a graph as a function of an input of one shape.

    Attributes:
        steps: segments of ops and fallbacks, in order.
        coverage: the number of nodes that run on compiled kernels, and the ones that do not.
        input: name of the input.
        outputs: names of the outputs, in the order of the graph.
    """

    def __init__(
        self,
        graph: Graph,
        tensors: Mapping[str, SparseTensor],
        shape: tuple[int, ...],
        machine: Machine,
        folded: Folded | None = None,
    ) -> None:
        """Lowers every node that the outputs depend on; fallbacks run once, on zeros, to learn their shapes.

        Args:
            graph: one input of float32.
            tensors: a tensor for each parameter of the graph.
            shape: shape of the input.
            machine: the kernels.
            folded: receives the values that are computed from weights alone, so that the reference need not compute
                them again if no plan can be made.

        Raises:
            UsageError: neither kernels nor the reference know an operator, or a form of it; or no kernel does, and the
                plan is for another machine.
            FormatError: the weights do not fit the graph, or values take too much memory.
        """
        check_opset(graph)
        self.input, self.outputs = graph.inputs[0].name, tuple(value.name for value in graph.outputs)
        self._machine = machine
        self.steps: list[KernelStep | FallbackStep] = []
        constants = Constants({**graph.constants, **{name: tensors[name] for name in graph.parameters}})
        self._folding_limit = folding_limit(constants.nbytes)
        self._running_limit = running_limit(4 * math.prod(shape))
        nodes = fuse([node for node, _ in live_nodes(graph.nodes, self.outputs)], constants, self.outputs)
        nodes = fuse_norms(nodes, lambda name: constants.dense(name) if name in constants else None, self.outputs)
        self._low = Lowering(nodes, constants, machine.target, RULES)
        self._low.begin(self.input, shape, self.outputs)
        # The values of a first run, on zeros, which goes along with the lowering.
        self._samples: dict[str, Array] = {self.input: np.zeros(shape, np.float32)}
        with np.errstate(all="ignore"):
            self.coverage = self._compile(nodes, constants, {} if folded is None else folded)
        del self._samples, self._low
        self._constants = {name: constants.dense(name) for name in self.outputs if name in constants}

    @property
    def cost(self) -> float:
        """Estimated time of all products as a share of the time of dense ones."""
        work = sum(step.work for step in self.steps)
        return work / max(sum(step.dense_work for step in self.steps), 1.0)

    def memory(self, kept: Iterable[Array] = ()) -> PlanMemory:
        """Returns the bytes that one run of this plan needs, computed from the plan, not measured.

        `measure/memory` builds its figures for this runtime from these.

        Args:
            kept: arrays that the caller keeps and counts itself.
        """
        return memory_of(self.steps, (self.input,), kept)

    def run(self, x: Array) -> tuple[Array, ...]:
        """Computes the outputs, in the order of the graph, for an input of the plan's shape.

        Raises:
            FormatError: a value does not fit the operator that reads it, or values take too much memory.
        """
        values: dict[str, Array] = {self.input: x}
        with self._running():
            for step in self.steps:
                step.run(values)
        values |= self._constants
        return for_caller((values[name] for name in self.outputs), (x, *self._constants.values()))

    def run_timed(self, x: Array) -> list[OpTime]:
        """Computes as `run` does, and returns the time of each op and fallback, in order, instead of the outputs."""
        values: dict[str, Array] = {self.input: x}
        with self._running():
            return [one for step in self.steps for one in step.run_timed(values)]

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """Limits the memory of values, and silences numpy: NaN and infinity go through as the arithmetic puts them."""
        with memory_limit(self._running_limit), np.errstate(all="ignore"):
            yield

    def _compile(self, nodes: Sequence[Node], constants: Constants, folded: Folded) -> Coverage:
        """Folds, lowers or falls back, node by node."""
        low, folded_bytes, lowered = self._low, 0, 0
        fallbacks: list[Fallback] = []
        for i, node in enumerate(nodes):
            if node.op == "Shape" and node.inputs[:1] and node.inputs[0] in low.shapes:
                # The function looks at the shape alone, so an array without memory will do.
                array = np.broadcast_to(np.float32(0), low.shapes[node.inputs[0]])
                constants.add(bind(node, constants.of_node(node)).compute([array]))
            # The transpose of a weight is not computed: a product reads it, whose kernel takes the weight as it is.
            elif _swaps_axes(node) and constants.add_transpose(node.outputs[0], node.inputs[0]):
                pass
            elif all(name in constants for name in node.inputs if name):
                known = constants.of_node(node)
                call = bind(node, known)
                # A few bytes of a graph can ask for any amount of memory, here and in every run.
                with memory_limit(self._folding_limit):
                    results = folded[node.outputs] = fold(call, known)
                    folded_bytes += sum(array.nbytes for array in results.values())
                    claim((folded_bytes,), np.uint8)
                constants.add(results)
            elif fallback := self._lower(i):
                fallbacks.append(fallback)
                self._fall_back(i, node, constants)
            else:
                lowered += 1
        self._export(len(nodes))
        return Coverage(lowered + len(fallbacks), tuple(fallbacks))

    def _lower(self, index: int) -> Fallback | None:
        """Lowers a node, in a new segment if it splits the batch in another way than the ops before it."""
        low = self._low
        batch = low.batch_of(index)
        # Convolutions run once for each image, which keeps planes in the cache; tokens of all images run together.
        if batch not in (None, low.batch):
            self._export(index)
            low.start(batch)
        with memory_limit(self._running_limit):
            fallback = low.lower(index)
        if fallback is not None and low.batch > 1:
            # A node that moves the batch axis, say, takes all images at once.
            self._export(index)
            low.start(1)
            with memory_limit(self._running_limit):
                fallback = low.lower(index)
        return fallback

    def _fall_back(self, index: int, node: Node, constants: Constants) -> None:
        """Ends the segment, and lets the reference compute a node."""
        low = self._low
        self._export(index)
        if not self._machine.runs:
            raise UsageError(
                f"operator {node.op} (output {node.outputs[0]!r}) has no kernel in this form, so no plan file can hold "
                f"it; export an archive, which runs it on numpy."
            )
        call = bind(node, constants.of_node(node))
        arrays = {name: constants.dense(name) for name in call.inputs if name in constants}
        # It runs at once, since the shapes of its outputs are known by running it alone.
        step = FallbackStep(call, arrays, low.last_read_by(index))
        self._add(step)
        for name, (shape, dtype) in step.results.items():
            low.shapes[name], low.types[name] = shape, dtype

    def _export(self, index: int) -> None:
        """Ends the segment, with everything in arrays that nodes from `index` on read."""
        for name in self._low.alive(index):
            self._low.array(name)
        self._end_segment()

    def _end_segment(self) -> None:
        """Makes a step of the segment, and begins another one."""
        if self._low.segment.ops:
            self._add(KernelStep(self._machine, self._low.segment, self._running_limit))
        self._low.start()

    def _add(self, step: KernelStep | FallbackStep) -> None:
        # Only fallbacks need values to learn their shapes, and a plan for another machine has none.
        if self._machine.runs:
            with memory_limit(self._running_limit):
                step.run(self._samples)
        self.steps.append(step)


def _swaps_axes(node: Node) -> bool:
    """Returns whether a node is the transpose of a matrix."""
    return node.op == "Transpose" and node.attributes.get("perm") == (1, 0) and len(node.inputs) == 1
