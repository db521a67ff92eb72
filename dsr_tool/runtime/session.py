"""Sessions: a model file that is ready to predict."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dsr_tool.errors import FormatError, UsageError, unknown_name
from dsr_tool.graph.fold import fold_norms
from dsr_tool.graph.ir import Graph, Value
from dsr_tool.runtime.compiler.machine import Machine
from dsr_tool.runtime.compiler.memory import PlanMemory
from dsr_tool.runtime.compiler.summary import OpTime
from dsr_tool.runtime.coverage import Coverage
from dsr_tool.runtime.kernels.library import library
from dsr_tool.runtime.plan_cache import PlanCache
from dsr_tool.runtime.reference.interpreter import Interpreter
from dsr_tool.runtime.source import Model, open_model
from dsr_tool.sparsity.at_rest import at_rest, dtype_of
from dsr_tool.sparsity.tensor import Array, SparseTensor

__all__ = ["RUNTIMES", "Session", "decode"]

RUNTIMES = ("auto", "native", "scipy")
_MAX_THREADS = 256
_MAX_EAGER_SIZE = 1 << 28
"""Largest input, in floats, for which a plan is compiled before the first run."""
_OPENED = frozenset(("config", "input", "output", "outputs", "runtime", "_graph", "_tensors", "_plan"))
"""Attributes of a session that follow from its file and its options, so that no pickle holds them."""


class Session:
    """A model that is ready to predict, on compiled kernels for sparse weights or on numpy and scipy alone.

    Weights stored as float16 are converted to the type of the input. Threads may share a session; with compiled
    kernels, their calls run one after the other.

    A forked process may go on with a session: it makes threads of its own. A pickle holds the path of the file and the
    options, and opens that file again; a copy shares the weights and has a plan of its own.

    Attributes:
        config: architecture, input shape, preprocessing and labels of the model.
        input: name, shape and type of the array that `run` expects; None in the shape for a free dimension.
        outputs: names, shapes and types of the arrays that `run_all` returns.
        output: the first of them, which `run` returns.
        runtime: `native` or `scipy`; `onnxruntime` if `auto` found the model too dense for sparse kernels.
        threads: number of threads that share the work of one call.
    """

    def __init__(
        self, source: Model | str | Path, threads: int = 1, batch: int | None = None, runtime: str = "auto"
    ) -> None:
        """Decodes the weights, folds norms into convolutions and compiles a plan.

        Args:
            source: path of an archive or an ONNX file, or a model from `open_model`.
            threads: number of threads that share the work of one call; scipy's products use one.
            batch: batch size to compile for, 1 by default; the first run with any other size compiles again.
            runtime: `native` for the compiled kernels, `scipy` for the reference, `auto` for the kernels if they are
                built for this machine, or for ONNX Runtime if it is installed and a dense product is faster.

        Raises:
            DsrError: the source is an ONNX file, and the package onnx is not installed.
            FileError: the file does not exist.
            FormatError: the file is damaged, or neither an archive nor an ONNX file.
            UsageError: the model has an operator that this runtime does not support, or an argument is not allowed.
        """
        if not 1 <= threads <= _MAX_THREADS:
            raise UsageError(f"threads {threads} is not in [1, {_MAX_THREADS}]; give at most one for each core.")
        if batch is not None and batch < 1:
            raise UsageError(f"batch {batch} is not positive; give 1 or more, or leave it out.")
        if runtime not in RUNTIMES:
            raise unknown_name("runtime", runtime, RUNTIMES)
        self.threads = threads
        self._options = (batch, runtime)
        self._open(open_model(source))

    def _open(self, model: Model) -> None:
        """Takes and decodes a model, and makes its plan."""
        self.config = model.config
        self.input: Value = model.graph.inputs[0]
        self.outputs: tuple[Value, ...] = model.graph.outputs
        self.output: Value = self.outputs[0]
        # Absolute, since a process that opens it again may have another current folder.
        self._path = model.path.absolute()
        self._graph, self._tensors = decode(model)
        self._compile()

    def _compile(self) -> None:
        """Makes the plan of the decoded model, and sets `runtime`."""
        batch, runtime = self._options
        machine = _machine(runtime, self.threads, self.input)
        self.runtime = "scipy" if machine is None else "native"
        self._plan: Interpreter | PlanCache = (
            Interpreter(self._graph, self._tensors)
            if machine is None
            else PlanCache(self._graph, self._tensors, machine)
        )
        shape = _eager_shape(self.input, batch)
        if isinstance(self._plan, PlanCache) and shape is not None:
            self.runtime = self._plan.compile_first(shape, may_replace=runtime == "auto", threads=self.threads)

    def __copy__(self) -> Session:
        copied = object.__new__(type(self))
        copied.__dict__ |= self.__dict__
        copied._compile()
        return copied

    def __deepcopy__(self, memo: dict[int, object]) -> Session:
        return self.__copy__()

    def __getstate__(self) -> dict[str, object]:
        if not self._path.is_file():
            raise UsageError(
                f"a session is pickled by the path of its file, and {str(self._path)!r} is no file; put it back, or "
                f"open a session in each process."
            )
        state = {name: value for name, value in self.__dict__.items() if name not in _OPENED}
        return {**state, "_checksum": _checksum(self._tensors)}

    def __setstate__(self, state: dict[str, object]) -> None:
        checksum = state.pop("_checksum")
        self.__dict__ |= state
        self._open(open_model(self._path))
        if _checksum(self._tensors) != checksum:
            raise FormatError(
                f"{str(self._path)!r} holds other weights than the session that was pickled; open a session of the "
                f"new file."
            )

    @property
    def coverage(self) -> Coverage | None:
        """Coverage of the latest plan: the nodes that run on compiled kernels, and those on the reference.

        None if no kernels run at all: with the runtimes `scipy` and `onnxruntime`, and before the first run of a model
        whose input shape is not fixed.
        """
        return self._plan.coverage if isinstance(self._plan, PlanCache) else None

    @property
    def memory(self) -> PlanMemory | None:
        """Bytes that the latest plan needs besides the decoded tensors of the session, computed from the plan.

        None whenever `coverage` is None.
        """
        return self._plan.memory if isinstance(self._plan, PlanCache) else None

    def run(self, x: Array) -> Array:
        """Predicts a batch as `run_all` does, and returns the first output, an array whose first axis is the batch."""
        return self.run_all(x)[self.output.name]

    def run_all(self, x: Array) -> dict[str, Array]:
        """Predicts a batch.

        Args:
            x: an array of the shape and type of `input`, usually float32 (batch, channels, height, width).

        Returns:
            Every output of the model by name, in the order of `outputs`; the caller may change the arrays.

        Raises:
            FormatError: a value does not fit the operator that reads it, or the values need too much memory.
            UsageError: the rank, size or type of `x` is not that of `input`.
        """
        x = self._checked(x)
        return dict(zip((value.name for value in self.outputs), self._plan.run(x), strict=True))

    def time_ops(self, x: Array) -> list[OpTime]:
        """Predicts a batch on the kernels, and returns the time of each op, in order, instead of the outputs.

        Args:
            x: as for `run_all`.

        Raises:
            FormatError: a value does not fit the operator that reads it, or the values need too much memory.
            UsageError: the rank, size or type of `x` is not that of `input`, or no kernels run this model.
        """
        x = self._checked(x)
        times = self._plan.run_timed(x) if isinstance(self._plan, PlanCache) else None
        if times is None:
            raise UsageError("the times of ops come from the kernels, and this model runs without them here.")
        return times

    def _checked(self, x: Array) -> Array:
        """Returns an input as an array; raises `UsageError` if its shape or type does not fit."""
        x, shape = np.asarray(x), self.input.shape
        fits = len(x.shape) == len(shape) and all(
            expected in (None, size) for size, expected in zip(x.shape, shape, strict=True)
        )
        if not fits or 0 in x.shape:
            expected = ", ".join("batch" if n is None else str(n) for n in shape)
            raise UsageError(f"input of shape {x.shape} does not fit; the model expects ({expected}).")
        if x.dtype != np.dtype(self.input.dtype):
            raise UsageError(
                f"input of type {x.dtype} does not fit; the model expects {self.input.dtype}, so convert it with "
                f"astype."
            )
        return x


def _checksum(tensors: Mapping[str, SparseTensor]) -> int:
    """Returns a checksum of names, shapes, positions and values."""
    total = 0
    for name, tensor in sorted(tensors.items()):
        total = zlib.crc32(f"{name} {tensor.mask.shape} {tensor.values.dtype}".encode(), total)
        if tensor.mask.stored is not None:
            total = zlib.crc32(np.ascontiguousarray(tensor.mask.stored).data, total)
        total = zlib.crc32(np.ascontiguousarray(tensor.values).data, total)
    return total


def _eager_shape(value: Value, batch: int | None) -> tuple[int, ...] | None:
    """Returns the input shape to compile for at once; None if it has a free dimension, or is empty or too large."""
    shape = (value.shape[0] or batch or 1, *value.shape[1:]) if value.shape else ()
    sizes = tuple(n for n in shape if n is not None and n > 0)
    return sizes if sizes and len(sizes) == len(shape) and math.prod(sizes) <= _MAX_EAGER_SIZE else None


def _machine(runtime: str, threads: int, value: Value) -> Machine | None:
    """Returns the kernels with their threads; None if the model runs on the reference.

    Raises:
        UsageError: `native` was requested, and no kernels can be loaded.
    """
    if runtime == "scipy":
        return None
    kernels = library()
    if runtime == "native" and kernels is None:
        raise UsageError(
            "runtime 'native' has no kernels here; `dsr-tool doctor` says why, and runtime 'scipy' runs everywhere."
        )
    # The kernels compute in float32 and take the first axis as the batch.
    if kernels is None or value.dtype != "float32" or not value.shape:
        return None
    return Machine(kernels, threads)


def decode(model: Model) -> tuple[Graph, dict[str, SparseTensor]]:
    """Decodes the weights of a model in the type of its input, and folds norms into convolutions.

    Returns:
        The computation that a session runs, and the tensors that it keeps.
    """
    given = model.graph.inputs[0].dtype
    # Inputs that are whole numbers, such as bytes of a picture, are converted in the graph; weights stay floats.
    dtype = given if np.issubdtype(given, np.floating) else "float32"
    tensors = {name: _as_type(model.tensor(name), dtype) for name in model.graph.parameters}
    graph, tensors = fold_norms(model.graph, tensors)
    return graph, {name: at_rest(tensor) for name, tensor in tensors.items()}


def _as_type(tensor: SparseTensor, dtype: str) -> SparseTensor:
    """Returns the tensor with its values as `dtype`; integer tensors and those that have it are left alone."""
    if dtype_of(tensor) == dtype or not np.issubdtype(dtype_of(tensor), np.floating):
        return tensor
    return SparseTensor(tensor.mask, tensor.values.astype(dtype, copy=False))
