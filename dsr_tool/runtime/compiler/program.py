"""The steps of a plan: segments of ops that run in one call, and fallbacks to the reference."""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from dsr_tool.errors import FormatError
from dsr_tool.graph.limits import claim, memory_limit
from dsr_tool.runtime.compiler.arena import allocate
from dsr_tool.runtime.compiler.encoding import encode
from dsr_tool.runtime.compiler.machine import Machine
from dsr_tool.runtime.compiler.segment import Segment
from dsr_tool.runtime.compiler.summary import OpSummary, OpTime, Origin, summary_of
from dsr_tool.runtime.kernels import ops as table
from dsr_tool.runtime.kernels.ops import LIMITS, Kind
from dsr_tool.runtime.reference.call import Call
from dsr_tool.sparsity.tensor import Array

__all__ = ["FallbackStep", "KernelStep"]


class KernelStep:
    """A segment that is ready to run.

    Attributes:
        ops: the structs that the kernels read.
        summaries: a line about each op.
        work: multiply-adds of its ops, as many as dense kernels would do in the same time.
        dense_work: multiply-adds of dense kernels for the same ops.
        arena_bytes: bytes of the arena that its values take.
        scratch_bytes: bytes that its ops use while they run, of all threads.
        packs: packed weights, which other segments and plans may share.
        tables: biases, pixel masks and index tables.
        output_bytes: bytes of each array that it fills, by name.
        outputs: shape of each of these.
        arrays: floats of one piece of each array that it reads or fills, by name, in the order of the buffers.
        images: number of pieces, each of which is a run of its ops.
        release: values that no later step reads; a segment drops none.
    """

    def __init__(self, machine: Machine, segment: Segment, limit: float) -> None:
        """Allocates the values of a segment and packs its weights.

        Args:
            machine: the kernels.
            segment: the ops.
            limit: bytes that its values may take together.

        Raises:
            FormatError: its values take more, or are too many.
        """
        arrays = len(segment.inputs) + len(segment.outputs)
        if arrays >= LIMITS["MAX_BUFFERS"]:
            raise FormatError(
                f"{arrays} values are exchanged with operators that have no kernel, over the limit of "
                f"{LIMITS['MAX_BUFFERS'] - 1}; use runtime 'scipy'."
            )
        with memory_limit(limit):
            arena = allocate(segment)
            claim((arena.floats,), np.float32)
            for value in segment.outputs.values():
                claim(value.shape, np.float32)
            encoded = encode(segment.ops, arena.addresses, machine.packer)
        self.ops, self.packs, self.tables = encoded.structs, encoded.packs, encoded.tables
        self.summaries = tuple(
            summary_of(op, struct, segment.origins.get(op), segment.batch)
            for op, struct in zip(segment.ops, self.ops, strict=True)
        )
        self.work = sum(op.work for op in segment.ops)
        self.dense_work = sum(op.dense_work for op in segment.ops)
        self.arena_bytes = 4 * arena.floats
        self.scratch_bytes = _scratch_bytes(self.ops, machine.target.threads)
        self.release: tuple[str, ...] = ()
        self._machine, self.images = machine, segment.batch
        self._inputs = tuple(segment.inputs)
        self.outputs = {name: value.shape for name, value in segment.outputs.items()}
        self.output_bytes = {name: 4 * math.prod(shape) for name, shape in self.outputs.items()}
        names = (*segment.inputs, *segment.outputs)
        self.arrays = {name: value.entries for name, value in zip(names, segment.arrays, strict=True)}
        steps = [0, *self.arrays.values()]
        self._steps = (ctypes.c_int64 * len(steps))(*steps)
        if machine.runs:
            # Grown now, so that the first run finds its memory.
            machine.arena(arena.floats)
            machine.scratch(self.scratch_bytes)

    def run(self, values: dict[str, Array]) -> None:
        """Reads its inputs from `values` and adds its outputs."""
        self._run(values, None)

    def run_timed(self, values: dict[str, Array]) -> list[OpTime]:
        """Runs as `run` does, and returns the time of each op."""
        nanoseconds = np.zeros(len(self.ops), np.int64)
        self._run(values, nanoseconds)
        return [OpTime(op, int(spent)) for op, spent in zip(self.summaries, nanoseconds, strict=True)]

    def _run(self, values: dict[str, Array], nanoseconds: Array | None) -> None:
        # New arrays in every run, since the caller keeps the output and may change it.
        outputs = {name: np.empty(shape, np.float32) for name, shape in self.outputs.items()}
        arrays = [*(np.ascontiguousarray(values[name], np.float32) for name in self._inputs), *outputs.values()]
        machine, arena = self._machine, self._machine.arena(self.arena_bytes // 4)
        # Addresses are new in every run; structs refer to buffers by number, so they stay as they are.
        starts = (ctypes.c_void_p * (len(arrays) + 1))(arena, *(array.ctypes.data for array in arrays))
        pool = machine.pool.address(machine.target.threads)
        scratch = machine.scratch(self.scratch_bytes)
        arguments = (self.ops, len(self.ops), starts, self._steps, len(starts), self.images, pool, scratch)
        if nanoseconds is None:
            machine.library.dsr_run(*arguments)
        else:
            machine.library.dsr_run_timed(*arguments, nanoseconds.ctypes.data)
        values.update(outputs)


def _scratch_bytes(ops: Iterable[table.Op], threads: int) -> int:
    """Returns the bytes that some ops use while they run, of all threads; the next op uses the same memory."""
    kinds = (Kind.MATMUL, Kind.RELAYOUT)
    if any(op.kind in kinds or (op.kind == Kind.SPMM and op.spmm.convert) for op in ops):
        return 4 * LIMITS["SCRATCH_FLOATS"] * threads
    return 0


class FallbackStep:
    """A node that the reference computes.

    Attributes:
        constants: arrays that it reads in every run, by name.
        release: values that no later step reads.
        results: shape and type of each output, known after the first run.
        work, dense_work: 0; the cost of a plan is that of its kernels.
    """

    work = dense_work = 0.0

    def __init__(self, call: Call, constants: Mapping[str, Array], release: Iterable[str]) -> None:
        """Keeps the node and its constants.

        Args:
            call: the node with its function of the reference.
            constants: those of its inputs that are known.
            release: values that no later step reads.
        """
        self._call = call
        self.constants, self.release = constants, tuple(release)
        self.results: dict[str, tuple[tuple[int, ...], npt.DTypeLike]] = {}

    @property
    def output_bytes(self) -> dict[str, int]:
        """Bytes of each array that it makes, by name."""
        return {name: math.prod(shape) * np.dtype(dtype).itemsize for name, (shape, dtype) in self.results.items()}

    def run(self, values: dict[str, Array]) -> None:
        """Reads its inputs from `values` and adds its outputs.

        Raises:
            FormatError: the shape of an output depends on the values of the inputs.
        """
        arguments = [
            None if not name else self.constants[name] if name in self.constants else values[name]
            for name in self._call.inputs
        ]
        outputs = self._call.compute(arguments)
        results: dict[str, tuple[tuple[int, ...], npt.DTypeLike]] = {
            name: (array.shape, array.dtype) for name, array in outputs.items()
        }
        self.results = self.results or results
        if results != self.results:
            # The plan was made for the first shapes, and its kernels do not check them.
            raise FormatError(
                f"the output shape of operator {self._call.node.op} depends on the values of its input, which the "
                f"kernels do not support; use runtime 'scipy'."
            )
        values.update(outputs)
        for name in self.release:
            values.pop(name, None)

    def run_timed(self, values: dict[str, Array]) -> list[OpTime]:
        """Runs as `run` does, and returns the time of the node."""
        start = time.perf_counter_ns()
        self.run(values)
        node = self._call.node
        shape, _ = self.results[node.outputs[0]]
        summary = OpSummary("reference", Origin.of(node, self.constants), shape[1:], on_reference=True)
        return [OpTime(summary, time.perf_counter_ns() - start)]
