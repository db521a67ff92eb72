"""Reads mutants of one kind of file, one after the other, and prints the result; runs in a process of its own.

    python worker.py KIND CORPUS_FOLDER SCRATCH_FOLDER SEED FIRST COUNT

A crash or a hang ends the process; `SCRATCH_FOLDER/at` then contains the number of the mutant.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from graphs import graph
from mutators import MUTATORS

from dsr_tool.errors import DsrError, UsageError

Reader = Callable[[Path], tuple[Callable[[], Any], Path]]
"""Takes a scratch folder; returns a function that reads the mutant, and the path where the mutant is expected."""

CAP_BYTES = 1 << 30
"""Memory that reading one small file may take; no reader needs a tenth of it for the files of this corpus."""
MOST_S = 4.0
"""Processor time that reading one mutant may take, in seconds."""
MOST_INPUTS = 10**6
"""Largest number of entries of an input that a mutant is run on: a mutant may ask for any size."""
_KILLED_AFTER_S = 60
"""Wall time after which a hanging reader is killed, in seconds."""


def main() -> None:
    """Reads `COUNT` mutants and prints one JSON document with the outcome."""
    kind, corpus_folder, scratch = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    seed, first, count = map(int, sys.argv[4:])
    faulthandler.enable()
    read, target = READERS[kind](scratch)
    corpus = [path.read_bytes() for path in sorted(corpus_folder.iterdir())]
    target.write_bytes(corpus[0])
    # The first read imports modules, which must not count. State_dicts of this corpus fit no network: UsageError.
    with contextlib.suppress(UsageError):
        read()
    _limit_memory()
    result: dict[str, Any] = {"accepted": 0, "rejected": 0, "slowest_s": 0.0, "failures": []}
    for number in range(first, first + count):
        random = np.random.default_rng([seed, number])
        mutators = (*MUTATORS[kind], graph, graph) if kind == "predict" else MUTATORS[kind]
        mutate = mutators[int(random.integers(len(mutators)))]
        target.write_bytes(mutate(random, corpus))
        (scratch / "at").write_text(str(number))
        _try(read, number, result)
    print(json.dumps(result))


def _limit_memory() -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + CAP_BYTES, resource.RLIM_INFINITY))


def _try(read: Callable[[], Any], number: int, result: dict[str, Any]) -> None:
    signal.alarm(_KILLED_AFTER_S)
    start = time.process_time()
    try:
        read()
        result["accepted"] += 1
    except DsrError as error:
        result["rejected"] += 1
        if not str(error).isprintable() or len(str(error)) > 500:
            result["failures"].append([number, f"no single sentence: {str(error)[:300]!r}"])
    except BaseException:  # noqa: BLE001 - whatever gets through is what this looks for
        result["failures"].append([number, traceback.format_exc()[-1500:]])
    took = time.process_time() - start
    signal.alarm(0)
    result["slowest_s"] = max(result["slowest_s"], took)
    if took > MOST_S:
        result["failures"].append([number, f"took {took:.1f} s"])


def _report(ending: str) -> Reader:
    def reader(scratch: Path) -> tuple[Callable[[], Any], Path]:
        from dsr_tool.report.sources import read

        path = scratch / f"mutant{ending}"
        return lambda: read(path), path

    return reader


def _predict(ending: str) -> Reader:
    def reader(scratch: Path) -> tuple[Callable[[], Any], Path]:
        from dsr_tool.runtime import Session

        def run() -> Any:
            session = Session(path)
            shape = [n or 1 for n in session.input.shape]
            return session.run(np.zeros(shape, session.input.dtype)) if math.prod(shape) < MOST_INPUTS else None

        path = scratch / f"mutant{ending}"
        return run, path

    return reader


def _report_and_predict(ending: str) -> Reader:
    def reader(scratch: Path) -> tuple[Callable[[], Any], Path]:
        (report, path), (predict, _) = _report(ending)(scratch), _predict(ending)(scratch)
        return lambda: (report(), predict()), path

    return reader


def _folder(name: str) -> Reader:
    def reader(scratch: Path) -> tuple[Callable[[], Any], Path]:
        from network import Network

        from converters.loading import load

        return lambda: load(scratch / "folder", module=Network()), scratch / "folder" / name

    return reader


def _state_dict(ending: str) -> Reader:
    def reader(scratch: Path) -> tuple[Callable[[], Any], Path]:
        from converters.torchvision_models import load

        path = scratch / f"mutant{ending}"
        return lambda: load("squeezenet1_1", str(path)), path

    return reader


def _plan(scratch: Path) -> tuple[Callable[[], Any], Path]:
    from dsr_tool.runtime.deploy.plan import PlanFile

    def run() -> object:
        plan = PlanFile(path, threads=2)
        shape = plan.inputs[0].shape
        return plan.run(np.zeros(shape, np.float32)) if len(plan.inputs) == 1 and _is_small(plan) else None

    def _is_small(plan: PlanFile) -> bool:
        return all(math.prod(value.shape) < MOST_INPUTS for value in (*plan.inputs, *plan.outputs))

    path = scratch / "mutant.dsrplan"
    return run, path


READERS: dict[str, Reader] = {
    "archive": _report(".dsr"),
    "predict": _predict(".dsr"),
    "onnx": _report_and_predict(".onnx"),
    "npz": _report(".npz"),
    "plan": _plan,
    "weights": _folder("model.safetensors"),
    "masks": _folder("masks.safetensors"),
    "config": _folder("config.json"),
    "safetensors": _state_dict(".safetensors"),
    "pickle": _state_dict(".pth"),
}

if __name__ == "__main__":
    main()
