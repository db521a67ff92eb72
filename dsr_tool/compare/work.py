"""Runs the cells of a comparison, in this process or in several that share the folder."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from dsr_tool.compare.attempt import attempt
from dsr_tool.compare.cells import Cell, Comparison
from dsr_tool.errors import CheckFailed

__all__ = ["Order", "stopped_by_sigterm", "work", "work_in_processes"]

_WAIT_S, _GRACE_S = 1.0, 5.0
"""Seconds between two looks at cells of other processes, and seconds that a process gets to end after SIGTERM."""

_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""Environment variables that give a process one thread; several with many threads each would slow each other down."""


_State = Literal["ran", "waits", "skipped"]


@dataclass(frozen=True)
class Order:
    """The work of one call of the command; JSON passes it to worker processes.

    Attributes:
        path: folder of the comparison.
        names: names of the cells to run; other cells of the plan do not change.
        since: time of the call, in seconds since 1970; cells that failed before it are tried again.
        deadline: value of `time.monotonic()` at which to stop; infinity for none.
        light: see `attempt`.
        data: data set, as `load_data` takes it; empty for that of the plan. The plan is a file, which may not name code
            to run, so code comes from here.
    """

    path: str
    names: tuple[str, ...]
    since: float
    deadline: float = math.inf
    light: bool = True
    data: str = ""


def work(order: Order, log: Callable[[str], None]) -> None:
    """Runs cells until all are complete or failed, or the deadline passes. Waits for cells of other processes.

    Args:
        order: cells and deadline.
        log: called with a line when a cell begins and when it ends.
    """
    comparison = Comparison(order.path)
    grid = comparison.plan()
    cells = [cell for cell in grid.cells if cell.name in order.names]
    waited = False
    # Rounds, because a cell that waits in one may start in the next.
    while True:
        states = [_run_if_possible(cell, comparison, order.data or grid.data, order, log) for cell in cells]
        if not {"ran", "waits"} & set(states) or time.monotonic() >= order.deadline:
            return
        # Every cell left is running elsewhere, or starts from one that is.
        if "ran" not in states:
            if not waited:
                log(f"waiting for other processes, which have {states.count('waits')} cells or what those start from")
                waited = True
            time.sleep(_WAIT_S)


def work_in_processes(order: Order, jobs: int, *, quiet: bool = False) -> None:
    """Runs cells by several processes with one thread each.

    No worker outlives this call or this process, however they end.

    Args:
        order: cells and deadline.
        jobs: number of processes.
        quiet: whether the workers write no lines to stderr.

    Raises:
        CheckFailed: a worker ended with an error.
    """
    environment = {**os.environ, **dict.fromkeys(_ONE_THREAD, "1")}
    command = [sys.executable, "-m", "dsr_tool.compare.work", json.dumps(asdict(order)), str(int(quiet))]
    workers: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(jobs):
            # Nothing is ever written to the pipe: it closes with this process, and `_end_with_parent` notices.
            pipe = subprocess.PIPE
            workers.append(subprocess.Popen(command, env=environment, stdin=pipe))  # noqa: S603 - our own module
        codes = [worker.wait() for worker in workers]
    finally:
        _end(workers)
    if any(codes):
        raise CheckFailed(
            f"{sum(map(bool, codes))} of {jobs} processes ended with exit code {max(codes, key=abs)}; complete cells "
            f"are kept; run the same command again to continue."
        )


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Makes SIGTERM raise `KeyboardInterrupt` within, like SIGINT. Only the main thread can do that; others skip it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)  # None if C code set it


def _end(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ends processes that still run. They need no time to save: a killed run resumes from its last complete epoch."""
    for worker in workers:
        worker.terminate()
    # One limit for all: with eight workers, one limit each could take 40 seconds.
    give_up = time.monotonic() + _GRACE_S
    for worker in workers:
        try:
            worker.wait(max(give_up - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
        if worker.stdin:
            worker.stdin.close()


def _run_if_possible(cell: Cell, comparison: Comparison, data: str, order: Order, log: Callable[[str], None]) -> _State:
    """Runs a cell if that is possible now.

    Returns:
        `ran` if it has a new record, `waits` for another process or for the cell that it starts from, `skipped` if this
        call has nothing to do for it.
    """
    if _finished(cell.name, comparison, order):
        return "skipped"
    if cell.needs is not None:
        # A cell whose start failed fails too: waiting for it would never end.
        start = comparison.record(cell.needs) or {}
        if start.get("status") == "failed" and _finished(cell.needs, comparison, order):
            error = f"it starts from {cell.needs}, which failed."
            comparison.write_record(cell.name, {"status": "failed", "error": error, "at": time.time()})
            log(f"{cell.name}: failed: {error}")
            return "ran"
        if start.get("status") != "complete":
            return "waits" if cell.needs in order.names and not _finished(cell.needs, comparison, order) else "skipped"
    # Time is up: a cell that has not begun stays so, and the next call starts it.
    if time.monotonic() >= order.deadline:
        return "skipped"
    # The lock ends with the process that holds it, so a cell of a killed one is free at once.
    lock = comparison.try_lock(cell.name)
    if lock is None:
        return "waits"
    try:
        if _finished(cell.name, comparison, order):  # another process may have run it since
            return "skipped"
        log(f"{cell.name}: begins")
        attempt(cell, comparison, data, deadline=order.deadline, light=order.light)
        log(f"{cell.name}: {_outcome(comparison.record(cell.name) or {})}")
    finally:
        lock.release()
    return "ran"


def _finished(name: str, comparison: Comparison, order: Order) -> bool:
    """Returns whether a cell is complete, or failed or paused in this call: a call tries each cell once."""
    record = comparison.record(name) or {}
    tried = record.get("status") in ("failed", "paused") and float(record.get("at", 0)) >= order.since
    return tried or record.get("status") == "complete"


def _outcome(record: Mapping[str, Any]) -> str:
    """Returns the line about a cell that has ended."""
    if record.get("status") == "complete":
        return (
            f"accuracy {record['test_accuracy']:.4f}, {record['archive_bytes']:,} bytes, {record['train_time_s']:.0f} s"
        )
    if record.get("status") == "paused":
        return f"paused after {record['epochs']} of {record['of_epochs']} epochs"
    return f"failed: {record.get('error')}"


def _end_with_parent() -> None:
    """Ends this process, even in the middle of a step, when stdin closes: then the parent process has ended."""
    while os.read(0, 1):
        pass
    os._exit(130)  # not sys.exit, which ends this thread alone


def _main() -> None:
    """Entry point of a worker of `work_in_processes`."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    order = Order(**json.loads(sys.argv[1]))
    torch.set_num_threads(1)
    quiet = bool(int(sys.argv[2]))
    try:
        work(order, lambda line: None if quiet else print(line, file=sys.stderr, flush=True))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    _main()
