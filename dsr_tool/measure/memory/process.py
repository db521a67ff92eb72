"""Memory as the system sees it: a child process loads one model, then runs or trains it.

The figure is `VmHWM`, the most resident memory since the peak was last reset, above the resident memory from before
the model was loaded; `ru_maxrss` would also count what the parent process held. A tiny network runs first, so that
the code and caches of the libraries are not part of the figure. The child has one thread per library, and glibc's
malloc has a fixed size above which freed memory goes back to the system: by default that size grows, freed blocks stay
in the heap, and the figure would measure its fragmentation.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from dsr_tool.errors import DsrError, FormatError, UsageError

__all__ = ["ENVIRONMENT", "Measured", "Request", "can_measure", "held_bytes", "measure", "reset_peak"]

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
}
"""Variables that are added to the environment of the child."""

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Request:
    """The work of a child process.

    Attributes:
        kind: `pytorch`, `training`, `onnxruntime`, `sparse`, or `scipy` for the sparse runtime on its reference.
        path: a model folder for `pytorch` and `training`, an ONNX file for `onnxruntime`, an archive or ONNX file for
            the others.
        shape: shape of the input, the batch first.
        optimizer: name of the optimizer, for `training`.
        maker: `module:callable` that builds the network of a folder with a network of the user's own.
        threads: number of worker threads, for `onnxruntime`, `sparse` and `scipy`.
        storage: how sparse weights are held, for `training`; see `SparseModel`. `dense` trains the plain network.
    """

    kind: str
    path: str
    shape: tuple[int, ...]
    optimizer: str = "sgd"
    maker: str | None = None
    threads: int = 1
    storage: str = "masked"


@dataclass(frozen=True)
class Measured:
    """The loading time and memory of a child; all bytes but `base_bytes` are above `base_bytes`.

    Attributes:
        base_bytes: resident memory before the model is loaded: interpreter and libraries.
        load_peak_bytes: peak while the model is loaded.
        loaded_bytes: resident memory once it is loaded.
        peak_bytes: peak while it runs or trains, the model itself included.
        ready_bytes: resident memory after that, which stays for the next run.
        load_s: seconds from the path to a model that is ready to run.
    """

    base_bytes: int
    load_peak_bytes: int
    loaded_bytes: int
    peak_bytes: int
    ready_bytes: int
    load_s: float


def can_measure() -> bool:
    """Returns whether this system tells the peak of a process's resident memory; Linux does."""
    return _STATUS.is_file()


def held_bytes(key: str) -> int:
    """Returns the memory of this process.

    Args:
        key: `VmRSS` for the resident memory now, `VmHWM` for its peak since the last `reset_peak`.
    """
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024  # the file says kB and means KiB
    raise FormatError(f"{str(_STATUS)!r} has no line {key}; this kernel does not count it.")


def reset_peak() -> None:
    """Starts `VmHWM` anew. Where the system refuses, the peak of loading counts as one of running."""
    try:
        _RESET.write_text("5", encoding="ascii")  # proc(5): 5 resets the peak of the resident set
    except OSError:
        return


def measure(request: Request, environment: Mapping[str, str] = ENVIRONMENT) -> Measured:
    """Runs the request in a child process.

    Args:
        request: the work of the child.
        environment: variables that are added to the environment of the child.

    Raises:
        UsageError: the system does not tell resident memory.
        DsrError: the child failed, for example because memory ran out.
    """
    if not can_measure():
        raise UsageError("measuring memory needs Linux, whose /proc tells how much memory a process holds.")
    # A new interpreter instead of a fork: a fork shares the parent's pages, and VmHWM would count them.
    child = subprocess.run(  # noqa: S603 - our own interpreter and our own module
        [sys.executable, "-m", "dsr_tool.measure.memory.child", json.dumps(asdict(request))],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    if child.returncode:
        # The last line of a traceback names the error.
        errors = child.stderr.strip().splitlines() or [f"exit code {child.returncode}"]
        raise DsrError(f"the measurement of {request.kind} for input {list(request.shape)} failed: {errors[-1]}.")
    # Libraries may print while they are imported; the result is the last line.
    return Measured(**json.loads(child.stdout.splitlines()[-1]))
