"""The plan of a graph for inputs of one shape: compiled kernels, and the reference's own where there is none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from dsr_tool.graph.fuse import fuse
from dsr_tool.graph.ir import Graph, Node
from dsr_tool.graph.limits import claim, folding_limit, memory_limit, running_limit
from dsr_tool.runtime.compiler.lowering import Lowering
from dsr_tool.runtime.compiler.memory import PlanMemory, memory_of
from dsr_tool.runtime.compiler.program import Machine, Native, Numpy
from dsr_tool.runtime.compiler.rules import RULES
from dsr_tool.runtime.compiler.constants import Known
from dsr_tool.runtime.coverage import Coverage, Fallback
from dsr_tool.runtime.reference.call import bind, fold
from dsr_tool.runtime.reference.interpreter import Folded, check_opset, dense_bytes, for_caller, live_nodes
from dsr_tool.sparsity.tensor import Array, SparseTensor, dense

__all__ = ["FastPlan"]


class FastPlan:
    """The first output of a graph as a function of an input of one shape.

    Attributes:
        cost: time of its products, as a share of what dense ones would take by rule of thumb.
        coverage: how many nodes run on compiled kernels, and which do not.
    """

    def __init__(
        self,
        graph: Graph,
        tensors: Mapping[str, SparseTensor],
        shape: tuple[int, ...],
        machine: Machine,
        folded: Folded | None = None,
    ) -> None:
        """Put every operator down that the first output depends on, and run what has no kernel once, on zeros.

        Args:
            graph: one input of float32.
            tensors: a tensor for each of its parameters.
            shape: of the input.
            machine: what it runs on.
            folded: gets what is computed from weights alone, for a plan of the reference where this one fails.

        Raises:
            UsageError: an operator, or a form of one, that nothing here knows.
            FormatError: the weights do not fit the graph, or what is computed takes too much memory.
        """
        check_opset(graph)
        self._input, self._output = graph.inputs[0].name, graph.outputs[0].name
        self._machine = machine
        self._steps: list[Native | Numpy] = []
        self._native, self._fallbacks = 0, list[Fallback]()
        known = Known({**graph.constants, **{name: tensors[name] for name in graph.parameters}})
        self._limits = (
            folding_limit(sum(map(dense_bytes, known.values()))),
            running_limit(4 * math.prod(shape)),
        )
        nodes = fuse([node for node, _ in live_nodes(graph.nodes, self._output)], known, self._output)
        self._lowering = Lowering(nodes, known, machine.lanes, machine.threads, machine.packs, RULES)
        self._lowering.begin(self._input, shape, self._output)
        self._samples: dict[str, Array] = {self._input: np.zeros(shape, np.float32)}
        with np.errstate(all="ignore"):
            self._prepare(nodes, known, {} if folded is None else folded)
        self.coverage = Coverage(self._native + len(self._fallbacks), tuple(self._fallbacks))
        self.cost = self._lowering.work / max(self._lowering.dense_work, 1.0)
        del self._samples, self._lowering
        self._constant = dense(known[self._output]) if self._output in known else None

    def run(self, x: Array) -> Array:
        """Compute the first output for an input of the plan's shape.

        Raises:
            FormatError: a value does not fit the operator that reads it, or values take too much memory.
        """
        values: dict[str, Array] = {self._input: x}
        with memory_limit(self._limits[1]), np.errstate(all="ignore"):
            for step in self._steps:
                step.run(values)
        result = values[self._output] if self._constant is None else self._constant
        return for_caller(result, shared=self._constant is not None)

    def memory(self) -> PlanMemory:
        """Returns the bytes that one run of this plan needs, computed from the plan, not measured.

        `measure/memory` builds its figures for this runtime from these.
        """
        return memory_of(self._steps, (self._input,))

    def _prepare(self, nodes: Sequence[Node], known: Known, done: Folded) -> None:
        low, folded = self._lowering, 0
        for i, node in enumerate(nodes):
            if node.op == "Shape" and node.inputs[:1] and node.inputs[0] in low.shapes:
                # The kernel looks at the shape alone; no array has to be there.
                known.update(bind(node, known).compute([np.broadcast_to(np.float32(0), low.shapes[node.inputs[0]])]))
            elif node.op == "Transpose" and self._swapped(node):
                known.swap(node.inputs[0], node.outputs[0])
            elif all(name in known for name in node.inputs if name):
                call = bind(node, known)
                with memory_limit(self._limits[0]):
                    made = done[node.outputs] = fold(call, known)
                    folded += sum(array.nbytes for array in made.values())
                    claim((folded,), np.uint8)
                known.update(made)
            elif fallback := self._lower(i):
                self._fall_back(i, node, known)
                self._fallbacks.append(fallback)
            else:
                self._native += 1
        if self._output not in known:
            low.array(self._output)
            self._close()

    def _swapped(self, node: Node) -> bool:
        """Whether a node swaps the axes of a matrix."""
        known, inputs = self._lowering.known, node.inputs
        return (
            node.attributes.get("perm") == (1, 0) and len(inputs) == 1 and isinstance(known.get(*inputs), SparseTensor)
        )

    def _lower(self, index: int) -> Fallback | None:
        """Lowers a node, in a new segment if it splits the batch in another way than the ops before it."""
        low = self._lowering
        batch = low.batch_of(index)
        if batch not in (None, low.batch):
            self._export(index)
            low.start(batch)
        return low.lower(index)

    def _export(self, index: int) -> None:
        """End the segment, with everything in arrays that nodes from `index` on read."""
        for name in self._lowering.alive(index):
            self._lowering.array(name)
        self._close()

    def _fall_back(self, index: int, node: Node, known: Known) -> None:
        """End the segment, and let the reference compute a node."""
        low = self._lowering
        self._export(index)
        call = bind(node, known)
        constants = {name: dense(known[name]) for name in call.inputs if name in known}
        step = Numpy(call, constants, low.finished(index))
        self._add(step)
        for name, (shape, dtype) in step.made.items():
            low.shapes[name], low.types[name] = shape, dtype

    def _close(self) -> None:
        """Make a step of the segment, and begin another."""
        if self._lowering.segment.ops:
            self._add(Native(self._machine, self._lowering.segment, self._limits[1]))
        self._lowering.start()

    def _add(self, step: Native | Numpy) -> None:
        with memory_limit(self._limits[1]):
            step.run(self._samples)
        self._steps.append(step)
