"""One training at a time in a run folder."""

from __future__ import annotations

import os
import sys
import weakref
from pathlib import Path

from dsr_tool.errors import FileError

if sys.platform != "win32":  # there nobody is kept out
    import fcntl

__all__ = ["Lock"]


class Lock:
    """Holds a file of a run until it is released or forgotten, or the process ends, however that happens.

    Attributes:
        release: gives it back.
    """

    def __init__(self, path: Path) -> None:
        """Take it.

        Raises:
            FileError: another process holds it, or it cannot be read.
        """
        try:
            file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise FileError(f"{str(path)!r} cannot be read: {error.strerror}; check its permissions.") from error
        self.release = weakref.finalize(self, os.close, file)
        if sys.platform == "win32":
            return
        # Processes that load data may outlive a killed parent for seconds, and must not hold the run meanwhile.
        os.register_at_fork(after_in_child=self.release)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.release()
            raise FileError(
                f"{str(path.parent)!r} is being trained by another process; wait for its end, or give another folder."
            ) from error
        except OSError:
            return  # a file system without locks: better trained unguarded than not at all
