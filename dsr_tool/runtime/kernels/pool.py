"""The threads that share the work of a kernel, and the lock of their callers; a forked process gets its own of both."""

from __future__ import annotations

import ctypes
import threading

from dsr_tool.runtime.kernels.forks import start_anew_in_children

__all__ = ["Pool"]


class Pool:
    """Threads that compute one kernel call at a time.

    A fork copies no thread but its caller: in the child, the threads of a pool are missing, and a lock that another
    thread held would never be released. So a child starts with a new lock, and makes threads when it needs them.

    Attributes:
        lock: held by whoever uses the threads, or memory that one call at a time may use.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        """Makes a pool without threads.

        Args:
            library: the loaded library of the kernels.
        """
        library.dsr_pool_new.restype, library.dsr_pool_new.argtypes = ctypes.c_void_p, (ctypes.c_int,)
        library.dsr_pool_free.restype, library.dsr_pool_free.argtypes = None, (ctypes.c_void_p,)
        self.lock = threading.RLock()
        self._library = library
        self._threads, self._address = 1, None
        start_anew_in_children(self)

    def address(self, threads: int) -> int | None:
        """Returns the address of the pool for the library; None, a null pointer, for one thread. Hold `lock`.

        The threads are made again when their number changes.

        Args:
            threads: number of threads, the caller among them.
        """
        if threads != self._threads:
            self._library.dsr_pool_free(self._address)
            # In this order, since an interrupt in between must not leave the address of a pool that is free.
            self._address = None
            self._address = self._library.dsr_pool_new(threads)
            self._threads = threads
        return self._address

    def start_anew(self) -> None:
        """Drops lock and threads in a forked process. Their memory is not freed, since that waits for the threads."""
        self.lock = threading.RLock()
        self._threads, self._address = 1, None

    def __del__(self) -> None:
        if hasattr(self, "_address"):
            self._library.dsr_pool_free(self._address)
