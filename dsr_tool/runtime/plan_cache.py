"""The plans of a session: one for each input shape, and what replaces them."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Mapping

from dsr_tool.errors import FormatError
from dsr_tool.graph.ir import Graph
from dsr_tool.runtime.compiler.machine import Machine
from dsr_tool.runtime.compiler.memory import PlanMemory
from dsr_tool.runtime.compiler.plan import Plan
from dsr_tool.runtime.compiler.summary import OpTime
from dsr_tool.runtime.coverage import Coverage
from dsr_tool.runtime.onnxruntime_plan import OnnxRuntimePlan
from dsr_tool.runtime.reference.interpreter import Folded, Interpreter
from dsr_tool.sparsity.at_rest import arrays_of
from dsr_tool.sparsity.tensor import Array, SparseTensor

__all__ = ["PlanCache"]

_MAX_COST = 0.95
"""`auto` picks ONNX Runtime when the estimated cost of the sparse plan is above this share of the dense one."""
_MAX_PLANS = 4
"""Number of input shapes for which a session keeps a plan; the one used least recently is dropped."""


class PlanCache:
    """A compiled plan for each of the input shapes that were used last, and what replaces them."""

    def __init__(self, graph: Graph, tensors: Mapping[str, SparseTensor], machine: Machine) -> None:
        self._graph, self._tensors, self._machine = graph, tensors, machine
        self._plans: OrderedDict[tuple[int, ...], Plan | Interpreter] = OrderedDict()
        self._reference: Interpreter | None = None
        self._dense: OnnxRuntimePlan | None = None

    @property
    def coverage(self) -> Coverage | None:
        """Coverage of the plan used last; None if that is not a compiled one."""
        latest = self._latest()
        return latest.coverage if latest else None

    @property
    def memory(self) -> PlanMemory | None:
        """Memory of the plan used last, besides the tensors; None if that is not a compiled one."""
        latest = self._latest()
        kept = (array for tensor in self._tensors.values() for array in arrays_of(tensor))
        return latest.memory(kept) if latest else None

    def compile_first(self, shape: tuple[int, ...], *, may_replace: bool, threads: int) -> str:
        """Compiles the plan for a shape, and hands the model to ONNX Runtime if that is allowed and faster.

        Returns:
            The name of the runtime that will run: `native`, `scipy` or `onnxruntime`.
        """
        plan = self._plan_for(shape)
        if not isinstance(plan, Plan):
            return "scipy"
        if may_replace and plan.cost > _MAX_COST:
            self._dense = OnnxRuntimePlan.of(self._graph, self._tensors, threads)
        return "native" if self._dense is None else "onnxruntime"

    def run(self, x: Array) -> tuple[Array, ...]:
        """Computes the outputs for an input, in the order of the graph."""
        if self._dense is not None:
            # The kernels may compute a batch that ONNX Runtime refuses.
            with contextlib.suppress(FormatError):
                return self._dense.run(x)
        # All plans compute in the same arena of the machine.
        with self._machine.pool.lock:
            plan = self._plan_for(x.shape)
            try:
                return plan.run(x)
            except (FormatError, MemoryError):
                if isinstance(plan, Interpreter):
                    raise
                # A plan holds for one set of shapes inside the graph; the reference computes any.
                return self._interpreter().run(x)

    def run_timed(self, x: Array) -> list[OpTime] | None:
        """Computes as `run` does, on the kernels, and returns the time of each op; None if the model has no plan."""
        with self._machine.pool.lock:
            plan = self._plan_for(x.shape)
            return plan.run_timed(x) if isinstance(plan, Plan) else None

    def _latest(self) -> Plan | None:
        """Returns the plan used last; None if that was the reference or ONNX Runtime."""
        latest = next(reversed(self._plans.values()), None)
        return latest if isinstance(latest, Plan) and self._dense is None else None

    def _plan_for(self, shape: tuple[int, ...]) -> Plan | Interpreter:
        """Returns the plan for an input shape, compiled if there is none, as the latest in the cache."""
        plan = self._plans.pop(shape, None) or self._compile(shape)
        self._plans[shape] = plan
        while len(self._plans) > _MAX_PLANS:
            self._plans.popitem(last=False)
        return plan

    def _compile(self, shape: tuple[int, ...]) -> Plan | Interpreter:
        folded: Folded = {}
        try:
            return Plan(self._graph, self._tensors, shape, self._machine, folded)
        except (FormatError, MemoryError):
            # The reference supports more graphs, and raises the error that users see for the others. It does not
            # compute again what depends on weights alone.
            return self._interpreter(folded)

    def _interpreter(self, folded: Folded | None = None) -> Interpreter:
        self._reference = self._reference or Interpreter(self._graph, self._tensors, folded)
        return self._reference
