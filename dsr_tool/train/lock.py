"""A lock that allows one training at a time in a run folder."""

from __future__ import annotations

import os
import sys
import weakref
from pathlib import Path

from dsr_tool.errors import FileError

if sys.platform != "win32":  # without fcntl, Windows has no lock
    import fcntl

__all__ = ["Lock"]


class Lock:
    """Locks a file until it is released or garbage-collected, or until the process ends in any way.

    Attributes:
        release: function that releases the lock.
    """

    def __init__(self, path: Path) -> None:
        """Locks the file at `path`.

        Raises:
            FileError: another process holds the lock, or the file cannot be read.
        """
        try:
            file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise FileError(f"{str(path)!r} cannot be read: {error.strerror}; check its permissions.") from error
        self.release = weakref.finalize(self, os.close, file)
        if sys.platform == "win32":
            return
        # Data-loading workers outlive a killed parent for seconds; they must not hold the lock meanwhile.
        os.register_at_fork(after_in_child=self.release)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.release()
            raise FileError(
                f"another process is training in {str(path.parent)!r}; wait for its end, or give another folder."
            ) from error
        except OSError:
            return  # some network file systems have no locks, and training must still be possible there
