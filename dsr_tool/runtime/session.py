"""Running an archive or an ONNX file."""

from __future__ import annotations

import contextlib
import math
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dsr_tool.errors import FormatError, UsageError, unknown_name
from dsr_tool.graph.fold import fold_norms
from dsr_tool.graph.ir import Graph, Value
from dsr_tool.runtime.compiler.plan import FastPlan
from dsr_tool.runtime.compiler.program import Machine
from dsr_tool.runtime.kernels.library import library
from dsr_tool.runtime.onnxruntime_plan import DensePlan
from dsr_tool.runtime.reference.interpreter import Folded, Interpreter
from dsr_tool.runtime.source import Model, open_model
from dsr_tool.sparsity.tensor import Array, SparseTensor

__all__ = ["RUNTIMES", "Session"]

RUNTIMES = ("auto", "native", "scipy")
_MOST_THREADS = 256
_MOST_COST = 0.95
"""Of sparse products beside dense ones, above which those are left to onnxruntime."""
_MOST_PLANS = 4
"""Shapes of inputs that a session is prepared for at a time."""
_MOST_PREPARED = 1 << 28
"""Floats of an input that a session makes ready for before it sees one."""


class Session:
    """A model that is ready to predict: compiled kernels for sparse weights, or numpy and scipy alone.

    Weights stored as float16 are computed with in the type of the input. Of a model with several outputs, the first
    is computed. Threads may share a session; with compiled kernels they take turns.

    Attributes:
        config: what the model is.
        input: name, shape and type of what `run` takes; None in the shape where any size goes.
        output: the same of what it returns.
        runtime: `native` or `scipy`, or `onnxruntime` where `auto` found the model too dense for sparse products.
        threads: that compute one call.
    """

    def __init__(
        self, source: Model | str | Path, threads: int = 1, batch: int | None = None, runtime: str = "auto"
    ) -> None:
        """Decode the weights, fold norms into convolutions, prepare every operator.

        Args:
            source: path of an archive, or of an ONNX file if it ends in `.onnx`; or what `open_model` made of one.
            threads: that share the work of one call; scipy's products run on one.
            batch: be ready for batches of this size; otherwise, the first of each size takes longer.
            runtime: `native` for the compiled kernels, `scipy` for the reference, `auto` for the kernels where there
                are some, or onnxruntime where it is installed and a dense product is quicker.

        Raises:
            DsrError: an ONNX file is given, and the package onnx is not installed.
            FileError: there is no such file.
            FormatError: it is damaged, or not of its kind.
            UsageError: it holds an operator that this runtime does not know, or an argument is not allowed.
        """
        if not 1 <= threads <= _MOST_THREADS:
            raise UsageError(f"threads {threads} is not allowed; give 1 to {_MOST_THREADS}, at most one for each core.")
        if batch is not None and batch < 1:
            raise UsageError(f"batch {batch} is not allowed; give 1 or more, or leave it out.")
        if runtime not in RUNTIMES:
            raise unknown_name("runtime", runtime, RUNTIMES)
        model = open_model(source)
        graph = model.graph
        self.config = model.config
        self.input: Value = graph.inputs[0]
        self.output: Value = graph.outputs[0]
        self.threads = threads
        tensors = {name: _as_type(model.tensor(name), self.input.dtype) for name in graph.parameters}
        graph, tensors = fold_norms(graph, tensors)
        machine = _machine(runtime, threads, self.input)
        self.runtime = "scipy" if machine is None else "native"
        self._plan: Interpreter | _Plans = Interpreter(graph, tensors) if machine is None else _Plans(graph, tensors, machine)
        if isinstance(self._plan, _Plans) and (shape := _first_shape(self.input, batch)):
            cost = self._plan.prepare(shape).cost
            if cost is None:
                self.runtime = "scipy"
            elif runtime == "auto" and cost > _MOST_COST and (given := DensePlan.of(graph, tensors, threads)):
                self._plan.dense, self.runtime = given, "onnxruntime"

    def run(self, x: Array) -> Array:
        """Predict.

        Args:
            x: a batch, of the shape and type that `input` says; usually float32 (batch, channels, height, width).

        Returns:
            The first output of the model, the batch first.

        Raises:
            UsageError: `x` has another rank, size or type.
        """
        x, shape = np.asarray(x), self.input.shape
        fits = len(x.shape) == len(shape) and all(
            wanted in (None, given) for given, wanted in zip(x.shape, shape, strict=True)
        )
        if not fits or 0 in x.shape:
            wanted = ", ".join("batch" if n is None else str(n) for n in shape)
            raise UsageError(f"input of shape {x.shape} does not fit; the model takes ({wanted}).")
        if x.dtype != np.dtype(self.input.dtype):
            raise UsageError(
                f"input of type {x.dtype} does not fit; the model takes {self.input.dtype}, so convert it with astype."
            )
        return self._plan.run(x)


class _Plans:
    """A plan for each shape of inputs, the ones used last.

    Attributes:
        dense: what computes in their place, where that is quicker.
    """

    def __init__(self, graph: Graph, tensors: Mapping[str, SparseTensor], machine: Machine) -> None:
        self._graph, self._tensors, self._machine = graph, tensors, machine
        self._plans: OrderedDict[tuple[int, ...], FastPlan | _Reference] = OrderedDict()
        self._reference: _Reference | None = None
        self.dense: DensePlan | None = None
        # The plans share memory for what they compute.
        self._lock = threading.Lock()

    def prepare(self, shape: tuple[int, ...]) -> FastPlan | _Reference:
        """The plan for a shape, made where there is none."""
        plan = self._plans.pop(shape, None) or self._made(shape)
        self._plans[shape] = plan
        while len(self._plans) > _MOST_PLANS:
            self._plans.popitem(last=False)
        return plan

    def run(self, x: Array) -> Array:
        """Compute the output for an input."""
        if self.dense is not None:
            with contextlib.suppress(FormatError):
                return self.dense.run(x)
        with self._lock:
            plan = self.prepare(x.shape)
            try:
                return plan.run(x)
            except (FormatError, MemoryError):
                if isinstance(plan, _Reference):
                    raise
                return self._by_scipy().run(x)

    def _made(self, shape: tuple[int, ...]) -> FastPlan | _Reference:
        folded: Folded = {}
        try:
            return FastPlan(self._graph, self._tensors, shape, self._machine, folded)
        except (FormatError, MemoryError):
            # Whatever the reference runs is run; where it cannot either, it says why.
            return self._by_scipy(folded)

    def _by_scipy(self, folded: Folded | None = None) -> _Reference:
        self._reference = self._reference or _Reference(self._graph, self._tensors, folded)
        return self._reference


class _Reference(Interpreter):
    """The plan of a shape that the kernels cannot take: it has no `cost`."""

    cost = None


def _first_shape(given: Value, batch: int | None) -> tuple[int, ...]:
    """What to be ready for; empty where sizes are open, or so large that the first run shall find out."""
    shape = (given.shape[0] or batch or 1, *given.shape[1:])
    sizes = tuple(n for n in shape if n is not None and n > 0)
    return sizes if len(sizes) == len(shape) and math.prod(sizes) <= _MOST_PREPARED else ()


def _machine(runtime: str, threads: int, given: Value) -> Machine | None:
    """What runs compiled kernels; None for scipy."""
    if runtime == "scipy":
        return None
    kernels = library()
    if runtime == "native" and kernels is None:
        raise UsageError("runtime 'native' has no kernels here; `dsr-tool doctor` says why, and 'scipy' always runs.")
    if kernels is None or given.dtype != "float32" or not given.shape:
        return None
    return Machine(kernels, threads)


def _as_type(tensor: SparseTensor, dtype: str) -> SparseTensor:
    if not np.issubdtype(tensor.values.dtype, np.floating):
        return tensor
    return SparseTensor(tensor.mask, tensor.values.astype(dtype, copy=False))
