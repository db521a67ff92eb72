"""Working through a comparison: in this process, or in several that share the folder."""

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
from typing import Any

import torch

from dsr_tool.compare.attempt import attempt
from dsr_tool.compare.cells import Cell, Comparison
from dsr_tool.errors import CheckFailed

__all__ = ["Order", "stopped_by_sigterm", "work", "work_in_processes"]

_WAIT_S, _GRACE_S = 1.0, 5.0
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Order:
    """What one call of the command asks for.

    Attributes:
        path: folder of the comparison.
        names: cells to run; others of the plan are left as they are.
        since: time of the call in seconds of the epoch; what failed before it is tried again.
        deadline: reading of `time.monotonic()` by which to stop; infinity for none.
        light: see `attempt`.
    """

    path: str
    names: tuple[str, ...]
    since: float
    deadline: float = math.inf
    light: bool = True


def work(order: Order, say: Callable[[str], None]) -> None:
    """Run cells until all are complete or failed, or time is up; those that another process has are waited for.

    Args:
        order: what to do.
        say: told a line when a cell begins, and when it ends.
    """
    comparison = Comparison(order.path)
    grid = comparison.plan()
    cells = [cell for cell in grid.cells if cell.name in order.names]
    waited = False
    while True:
        seen = [_try(cell, comparison, grid.data, order, say) for cell in cells]
        if not {"ran", "waits"} & set(seen) or time.monotonic() >= order.deadline:
            return
        if "ran" not in seen:
            if not waited:
                say(f"waiting for other processes, which have {seen.count('waits')} cells or what those start from")
                waited = True
            time.sleep(_WAIT_S)


def work_in_processes(order: Order, jobs: int, *, quiet: bool = False) -> None:
    """The same by several processes of one thread each, whose lines come on stderr unless they are `quiet`.

    None of them outlives this call, nor this process, however either ends.

    Raises:
        CheckFailed: one of them ended for a reason of its own.
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
            f"{sum(map(bool, codes))} of {jobs} processes ended with exit code {max(codes, key=abs)}; what was "
            f"complete is kept, and the same command goes on."
        )


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Within it SIGTERM raises `KeyboardInterrupt`, as SIGINT does; in the main thread, which alone may say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)  # none where it was not set by Python


def _end(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    """End processes that have not ended yet, at once: what they had written whole is what there is to go on from."""
    for worker in workers:
        worker.terminate()
    give_up = time.monotonic() + _GRACE_S
    for worker in workers:
        try:
            worker.wait(max(give_up - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
        if worker.stdin:
            worker.stdin.close()


def _try(cell: Cell, comparison: Comparison, data: str, order: Order, say: Callable[[str], None]) -> str:
    """Run a cell where that is possible now: `over` (nothing is to be done in this call), `waits` or `ran`."""
    if _over(cell.name, comparison, order):
        return "over"
    if cell.needs is not None:
        start = comparison.record(cell.needs) or {}
        if start.get("status") == "failed" and _over(cell.needs, comparison, order):
            error = f"it starts from {cell.needs}, which failed."
            comparison.note(cell.name, {"status": "failed", "error": error, "at": time.time()})
            say(f"{cell.name}: failed: {error}")
            return "ran"
        if start.get("status") != "complete":
            return "waits" if cell.needs in order.names and not _over(cell.needs, comparison, order) else "over"
    if time.monotonic() >= order.deadline:
        return "over"
    lock = comparison.take(cell.name)
    if lock is None:
        return "waits"
    try:
        if _over(cell.name, comparison, order):  # meanwhile, by another process
            return "over"
        say(f"{cell.name}: begins")
        attempt(cell, comparison, data, deadline=order.deadline, light=order.light)
        say(f"{cell.name}: {_told(comparison.record(cell.name) or {})}")
    finally:
        lock.release()
    return "ran"


def _over(name: str, comparison: Comparison, order: Order) -> bool:
    """Whether there is nothing to do for a cell in this call, which tries each once."""
    record = comparison.record(name) or {}
    tried = record.get("status") in ("failed", "paused") and float(record.get("at", 0)) >= order.since
    return tried or record.get("status") == "complete"


def _told(record: Mapping[str, Any]) -> str:
    if record.get("status") == "complete":
        return (
            f"accuracy {record['test_accuracy']:.4f}, {record['archive_bytes']:,} bytes, {record['train_time_s']:.0f} s"
        )
    if record.get("status") == "paused":
        return f"paused after {record['epochs']} of {record['of_epochs']} epochs"
    return f"failed: {record.get('error')}"


def _end_with_parent() -> None:
    """Wait for the end of stdin, which is that of the process that started this one; then end it, in a step or out."""
    while os.read(0, 1):
        pass
    os._exit(130)


def _main() -> None:
    """A process of `work_in_processes`."""
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
