"""The kernels as a machine: the loaded library, its threads, and the memory that all plans of a session compute in."""

from __future__ import annotations

import contextlib
import ctypes
import mmap

import numpy as np

from dsr_tool.errors import DsrError
from dsr_tool.runtime.compiler.op import Target, l1_class
from dsr_tool.runtime.compiler.packing import Packer
from dsr_tool.runtime.kernels.cpu import caches
from dsr_tool.runtime.kernels.ops import LAYOUT, library_layout
from dsr_tool.runtime.kernels.pool import Pool
from dsr_tool.sparsity.tensor import Array

__all__ = ["Machine"]

_LARGE_PAGE = 2 << 20
"""Bytes of a large page of the system."""
_LINE = 64
"""Bytes of a line of the cache."""


class Machine:
    """The kernels, their threads and their memory, which all plans of a session share.

    Attributes:
        library: the loaded library.
        target: the properties of the kernels that the compiler asks for.
        packer: packs weights, and keeps those that some plan uses.
        pool: the threads, and the lock that is held during a run.
        runs: False if plans are made for another machine, so that nothing of them may run here.
    """

    def __init__(self, library: ctypes.CDLL, threads: int, *, target: Target | None = None) -> None:
        """Prepares the kernels.

        Args:
            library: the loaded library.
            threads: number of threads that share an op.
            target: kernels of another machine, for which a plan is written: its packed weights keep their recipes.

        Raises:
            DsrError: the library was built from other sources.
        """
        _declare(library)
        # The kernels take every field on trust, so one that moved would be read as an address.
        if library_layout(library) != LAYOUT:
            raise DsrError("the kernels were built from other sources than this version; install dsr-tool again.")
        self.library = library
        self.target, self.runs = target or _target(library, threads), target is None
        self.packer = Packer(library, keep_recipes=not self.runs)
        self.pool = Pool(library)
        self._memory = np.zeros(0, np.float32)
        self._scratch = np.zeros(0, np.uint8)

    @property
    def lanes(self) -> int:
        """Floats in a vector of the kernels."""
        return self.target.lanes

    def arena(self, floats: int) -> int:
        """Returns the address of memory for the values of one run; runs use the same memory one after another."""
        if floats > self._memory.size:
            self._memory = _pages(floats * 4).view(np.float32)
        return self._memory.ctypes.data

    def scratch(self, nbytes: int) -> int:
        """Returns the address of so many bytes that ops use while they run; for 0 it means nothing."""
        if nbytes > self._scratch.nbytes:
            # At whole cache lines. Zeros, since SPMM notes there which values it has converted.
            memory = np.zeros(nbytes + _LINE, np.uint8)
            start = -memory.ctypes.data % _LINE
            self._scratch = memory[start : start + nbytes]
        return self._scratch.ctypes.data


def _pages(nbytes: int) -> Array:
    """Returns zeros at the start of a page, in large pages if the system has them, since planes lie far apart."""
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


def _target(library: ctypes.CDLL, threads: int) -> Target:
    """Returns the properties of a library's kernels on this processor."""
    l1, l2 = caches()
    widest = (library.dsr_widest_tile(0), library.dsr_widest_tile(1))
    return Target(library.dsr_lanes(), threads, *widest, l1_class(l1), l2)


def _declare(library: ctypes.CDLL) -> None:
    """Tells ctypes the arguments and results of the library's functions."""
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.dsr_run.argtypes = (pointer, number, pointer, pointer, number, number, pointer, pointer)
    library.dsr_run.restype = None
    library.dsr_run_timed.argtypes = (*library.dsr_run.argtypes, pointer)
    library.dsr_run_timed.restype = None
