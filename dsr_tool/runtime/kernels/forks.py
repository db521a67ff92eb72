"""Objects that start anew in a forked process, because a fork copies no thread but its caller."""

from __future__ import annotations

import os
import weakref
from typing import Protocol

__all__ = ["start_anew_in_children"]


class HasThreads(Protocol):
    """An object with threads, or with a lock that threads hold."""

    def start_anew(self) -> None:
        """Drops the threads and locks, which are those of another process."""


_ALIVE: weakref.WeakSet[HasThreads] = weakref.WeakSet()


def start_anew_in_children(thing: HasThreads) -> None:
    """Makes every process that is forked from now on call `start_anew` of an object, while it is alive."""
    _ALIVE.add(thing)


def _start_anew() -> None:
    for thing in _ALIVE:
        thing.start_anew()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_start_anew)
