"""Memory as the system sees it: one model in a child process of its own, which runs or trains it.

What is measured is `VmHWM`, the most resident memory, beside the resident memory from before the model was made;
`ru_maxrss` would also count what the parent held. A tiny network goes first, so that a library's own code and caches
are no part of it. One thread, and a fixed limit of glibc's malloc above which memory goes back to the system when
it is freed: with its moving limit, freed blocks stay in the heap, and what is measured is its fragmentation.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
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
"""Added to the environment of the child."""

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Request:
    """What the child does.

    Attributes:
        kind: `pytorch`, `training`, `onnxruntime`, `sparse` or `scipy`.
        path: model folder for `pytorch` and `training`, ONNX file for `onnxruntime`, archive for the last two.
        shape: of the whole batch.
        optimizer: of `training`.
        maker: for a folder with a network of the user's own, what makes it.
        threads: of the last three.
    """

    kind: str
    path: str
    shape: tuple[int, ...]
    optimizer: str = "sgd"
    maker: str | None = None
    threads: int = 1


@dataclass(frozen=True)
class Measured:
    """Time of loading, and bytes above the resident memory from before the model.

    Attributes:
        base_bytes: that memory: interpreter and libraries.
        load_peak_bytes: most while the model was loaded.
        loaded_bytes: after that.
        peak_bytes: most while it ran or trained, the model itself included.
        ready_bytes: after that, what stays for the next run.
        load_s: seconds from the path to a model that is ready.
    """

    base_bytes: int
    load_peak_bytes: int
    loaded_bytes: int
    peak_bytes: int
    ready_bytes: int
    load_s: float


def can_measure() -> bool:
    """Whether this system tells the most resident memory of a process (Linux does)."""
    return _STATUS.is_file()


def held_bytes(key: str) -> int:
    """What this process holds: `VmRSS` now, `VmHWM` at most since the last `reset_peak`."""
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise FormatError(f"{str(_STATUS)!r} has no line {key}.")


def reset_peak() -> None:
    """Let VmHWM begin anew; where the system refuses, the peak of loading counts as one of running."""
    try:
        _RESET.write_text("5", encoding="ascii")
    except OSError:
        return


def measure(request: Request) -> Measured:
    """Run the request in a child process.

    Raises:
        UsageError: the system does not tell resident memory.
        DsrError: the child failed, for want of memory for example.
    """
    if not can_measure():
        raise UsageError("memory can be measured on Linux alone, whose /proc says what a process holds.")
    done = subprocess.run(  # noqa: S603 - our own interpreter and our own module
        [sys.executable, "-m", "dsr_tool.measure.memory.child", json.dumps(asdict(request))],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **ENVIRONMENT},
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise DsrError(f"the measurement of {request.kind} for input {list(request.shape)} failed: {said[-1]}.")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))
