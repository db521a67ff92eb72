"""What a plan is made of: lists of operations that run in one call, and single operators of the reference."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from dsr_tool.errors import DsrError, FormatError
from dsr_tool.graph.limits import claim, memory_limit
from dsr_tool.runtime.compiler.packing import Pack
from dsr_tool.runtime.compiler.segment import Segment
from dsr_tool.runtime.kernels.ops import Operation
from dsr_tool.runtime.reference.call import Call
from dsr_tool.sparsity.tensor import Array

__all__ = ["Machine", "Native", "Numpy"]

_LARGE_PAGE = 2 << 20
_MOST_ARRAYS = 256  # as in kernels/run.cpp


class Machine:
    """The kernels, their threads and their memory, which all plans of a session share.

    Attributes:
        library: the kernels.
        threads: that they run on.
        lanes: floats in a vector of theirs.
        packs: weights as they want them, by layer and layout.
    """

    def __init__(self, library: ctypes.CDLL, threads: int) -> None:
        _declare(library)
        if library.dsr_operation_bytes() != ctypes.sizeof(Operation):
            raise DsrError("the kernels were built from other sources than this version; install dsr-tool again.")
        self.library, self.threads = library, threads
        self.lanes: int = library.dsr_lanes()
        # Only as long as a plan uses them.
        self.packs: weakref.WeakValueDictionary[Any, Pack] = weakref.WeakValueDictionary()
        self.pool = library.dsr_pool_new(threads)
        self._process = os.getpid()
        self._memory = np.zeros(0, np.float32)

    def __del__(self) -> None:
        # A fork has none of the threads, and would wait for them for ever.
        if hasattr(self, "_process") and self._process == os.getpid():
            self.library.dsr_pool_free(self.pool)

    def arena(self, floats: int) -> int:
        """Address of memory for so many floats, for the values of one run."""
        if floats > self._memory.size:
            self._memory = _pages(floats * 4).view(np.float32)
        return self._memory.ctypes.data


def _pages(nbytes: int) -> Array:
    """Zeros at the start of a page; in large pages where the system has them, since planes lie far apart."""
    size = -(-nbytes // _LARGE_PAGE) * _LARGE_PAGE + _LARGE_PAGE
    # Private, since shared memory seldom comes in large pages.
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
    pages = mmap.mmap(-1, size, **private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(pages, np.uint8)
    start = -memory.ctypes.data % _LARGE_PAGE
    return memory[start : start + nbytes]


def _declare(library: ctypes.CDLL) -> None:
    """Tell ctypes what the functions take."""
    library.dsr_pool_new.restype = ctypes.c_void_p
    library.dsr_pool_free.argtypes = (ctypes.c_void_p,)
    library.dsr_pool_free.restype = None
    library.dsr_operation_bytes.restype = ctypes.c_int64
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.dsr_run.argtypes = (pointer, number, pointer, pointer, number, number, pointer)
    library.dsr_run.restype = None


class Native:
    """A segment that is ready to run.

    Attributes:
        arena_bytes: bytes of the arena that its values take.
        op_bytes: bytes of its array of ops.
        packs: packed weights, which other segments and plans may share.
        tables: biases, pixel masks and index tables.
        output_bytes: bytes of each array that it fills, by name.
        release: values that nobody reads after it; a segment drops none.
    """

    def __init__(self, machine: Machine, segment: Segment, limit: float) -> None:
        """Lay out the values and the weights of a segment.

        Args:
            machine: what it runs on.
            segment: the operations.
            limit: bytes that its values may take together.

        Raises:
            FormatError: they take more.
        """
        if len(segment.inputs) + len(segment.outputs) >= _MOST_ARRAYS:
            raise FormatError(f"operators without a kernel read and make more than {_MOST_ARRAYS} values at once.")
        with memory_limit(limit):
            self._floats = segment.place()
            claim((self._floats,), np.float32)
            for value in segment.outputs.values():
                claim(value.shape, np.float32)
            self._operations, self._kept = segment.finished()
        self._machine, self._batch = machine, segment.batch
        self._inputs = tuple(segment.inputs)
        self._outputs = {name: value.shape for name, value in segment.outputs.items()}
        values = [*segment.inputs.values(), *segment.outputs.values()]
        self._steps = (ctypes.c_int64 * (len(values) + 1))(0, *(value.entries for value in values))
        machine.arena(self._floats)
        self.packs = [item for item in self._kept if isinstance(item, Pack)]
        inside = {id(array) for pack in self.packs for array in pack.arrays}
        self.tables = [item for item in self._kept if isinstance(item, np.ndarray) and id(item) not in inside]
        self.arena_bytes = 4 * self._floats
        self.op_bytes = ctypes.sizeof(self._operations)
        self.output_bytes = {name: 4 * math.prod(shape) for name, shape in self._outputs.items()}
        self.release: tuple[str, ...] = ()

    def run(self, values: dict[str, Array]) -> None:
        """Read the inputs from `values` and put the outputs there."""
        outputs = {name: np.empty(shape, np.float32) for name, shape in self._outputs.items()}
        arrays = [*(np.ascontiguousarray(values[name], np.float32) for name in self._inputs), *outputs.values()]
        machine, arena = self._machine, self._machine.arena(self._floats)
        starts = (ctypes.c_void_p * (len(arrays) + 1))(arena, *(array.ctypes.data for array in arrays))
        machine.library.dsr_run(
            self._operations, len(self._operations), starts, self._steps, len(starts), self._batch, machine.pool
        )
        values.update(outputs)


class Numpy:
    """An operator that the reference computes.

    Attributes:
        made: shape and type of what it makes, as of its first run.
        constants: arrays that it reads in every run, by name.
        release: values that nobody reads after it.
    """

    def __init__(self, call: Call, constants: Mapping[str, Array], release: Iterable[str]) -> None:
        """Keeps the node and its constants.

        Args:
            call: the node with its function of the reference.
            constants: those of its inputs that are known.
            release: values that no later step reads.
        """
        self._call = call
        self.constants, self.release = constants, tuple(release)
        self.made: dict[str, tuple[tuple[int, ...], Any]] = {}

    @property
    def output_bytes(self) -> dict[str, int]:
        """Returns the bytes of each array that it makes, by name."""
        return {name: math.prod(shape) * np.dtype(dtype).itemsize for name, (shape, dtype) in self.made.items()}

    def run(self, values: dict[str, Array]) -> None:
        """Read the inputs from `values` and put the outputs there.

        Raises:
            FormatError: a shape depends on more than the shape of the input.
        """
        arguments = [
            None if not name else self.constants[name] if name in self.constants else values[name]
            for name in self._call.inputs
        ]
        made = self._call.compute(arguments)
        found = {name: (array.shape, array.dtype) for name, array in made.items()}
        self.made = self.made or found
        if found != self.made:
            # The plan goes by shapes, and its kernels take them on trust.
            raise FormatError(
                f"the output shape of operator {self._call.node.op} depends on the values of its input, which the "
                f"kernels do not support; use runtime 'scipy'."
            )
        values.update(made)
        for name in self.release:
            values.pop(name, None)
