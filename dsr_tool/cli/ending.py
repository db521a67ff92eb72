"""A process ends with a sentence when SIGTERM comes, as torchrun sends it to the others of a run that lost one."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from dsr_tool.errors import DsrError

__all__ = ["ended_by_sigterm"]

_GRACE_S = 3.0
"""Seconds after SIGTERM in which a process ends by itself; torchrun waits for 30 before it kills."""
_TOLD = (
    "this process was told to end (SIGTERM), as torchrun does when another process of the run has ended; give --resume "
    "to go on after the last complete epoch."
)


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Makes SIGTERM raise `DsrError` within. Only the main thread can do that; others skip it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # Python runs a handler only between two of its own instructions. The pipe is written at once, so that a thread can
    # end a process whose main thread waits in torch: for others to join, or for a GPU.
    pipe_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    before = signal.signal(signal.SIGTERM, _refuse)
    done = threading.Event()
    watch = threading.Thread(target=_watch, args=(reader, done), name="sigterm", daemon=True)
    watch.start()
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)  # None if C code set it
        signal.set_wakeup_fd(pipe_before)
        done.set()
        os.close(writer)  # wakes the thread
        watch.join()
        os.close(reader)


def _refuse(number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001 - the signature of a handler
    raise DsrError(_TOLD)


def _watch(reader: int, done: threading.Event) -> None:
    """Ends the process some seconds after SIGTERM, unless it has ended what it does."""
    while received := os.read(reader, 1):
        if received[0] == signal.SIGTERM and not done.wait(_GRACE_S):
            # Files are replaced whole or not at all, so there is nothing to clean up.
            sys.stderr.write(f"dsr-tool: {_TOLD}\n")
            sys.stderr.flush()
            os._exit(1)
