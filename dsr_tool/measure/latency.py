"""Latency, start and memory of the sparse runtime beside ONNX Runtime on the dense model, in one run.

Both take turns in one process on the same input, and the ratio is of each pair, so that a drifting machine moves both.
Each turn runs twice and times the second, so that neither finds its weights pushed out by the other's. Start and memory
are of child processes that load and run one of them alone. Threads of ONNX Runtime do not spin when they wait,
since they would take cores from the turn that is timed.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsr_tool.errors import UsageError, unknown_name
from dsr_tool.files import require_file
from dsr_tool.measure.memory.process import Measured, Request, can_measure, measure
from dsr_tool.runtime import Session
from dsr_tool.runtime.kernels.library import level
from dsr_tool.runtime.source import Model, open_model
from dsr_tool.sparsity.tensor import Array

__all__ = ["RUNTIMES", "Settings", "bench_document", "open_session", "paired", "spread"]

RUNTIMES = ("sparse", "scipy")

_MOST_BATCH, _MOST_ROUNDS, _FEWEST_ROUNDS = 1024, 10_000, 4
_WARM_UP, _CHILDREN = 2, 3


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        batch: inputs at once.
        threads: of both.
        rounds: pairs of timed runs.
        runtime: of ours, `sparse` or `scipy`.
    """

    batch: int = 1
    threads: int = 1
    rounds: int = 20
    runtime: str = "sparse"

    def check(self) -> None:
        """Raise `UsageError` for a value that is not allowed."""
        cores = os.cpu_count() or 1
        if self.runtime not in RUNTIMES:
            raise unknown_name("--runtime", self.runtime, RUNTIMES)
        for name, value, least, most, unit in (
            ("--batch", self.batch, 1, _MOST_BATCH, "inputs"),
            ("--threads", self.threads, 1, cores, "threads, as many as there are cores"),
            ("--rounds", self.rounds, _FEWEST_ROUNDS, _MOST_ROUNDS, "rounds"),
        ):
            if not least <= value <= most:
                raise UsageError(f"{name} {value} is not allowed; give {least} to {most:,} {unit}.")


def bench_document(path: Path, settings: Settings, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Measure a file, schema `dsr-tool/bench/1`.

    Args:
        path: an archive or an ONNX file.
        settings: what to measure.
        say: is told what is going on.

    Raises:
        FileError: there is no such file.
        FormatError: it is damaged.
        UsageError: a setting that is not allowed, or a model that one of the two does not run.
    """
    settings.check()
    with tempfile.TemporaryDirectory(prefix="dsr-tool-bench-") as folder:
        say("writing the dense model")
        require_file(path, "FILE")
        model = open_model(path)
        dense = _dense(model, Path(folder))
        x = _inputs(model, settings.batch)
        say(f"running both, {settings.rounds} rounds")
        ours = open_session(model, settings.runtime, settings.batch, settings.threads)
        latency, outputs = _latency(ours, dense, x, settings)
        children = {}
        if can_measure():
            say("loading and running each in processes of its own")
            for name, kind, file in (("ours", settings.runtime, path), ("dense", "onnxruntime", dense)):
                children[name] = _of_children(Request(kind, str(file), x.shape, threads=settings.threads))
        return {
            "schema": "dsr-tool/bench/1",
            "file": str(path),
            "architecture": model.config.architecture,
            "input_shape": list(x.shape[1:]),
            "batch": settings.batch,
            "threads": settings.threads,
            "rounds": settings.rounds,
            "runtime": settings.runtime,
            "runs_on": ours.runtime,
            "kernels": level() if ours.runtime == "native" else None,
            "latency": latency,
            "outputs": outputs,
            "load_s": {name: child.load_s for name, child in children.items()} or None,
            "loaded_bytes": {name: child.ready_bytes for name, child in children.items()} or None,
            "peak_bytes": {name: child.peak_bytes for name, child in children.items()} or None,
        }


def open_session(source: Model | str | Path, runtime: str, batch: int, threads: int) -> Session:
    """A session of ours, by the name that the command line has for its runtime."""
    return Session(source, threads=threads, batch=batch, runtime="scipy" if runtime == "scipy" else "auto")


def _dense(model: Model, folder: Path) -> Path:
    """The dense model as an ONNX file; one that is an ONNX file itself keeps its nodes as they are."""
    from exporters.onnx.densify import densify
    from exporters.onnx.write import to_onnx
    from exporters.onnx.read import read_onnx

    if model.path.suffix.lower() == ".onnx":
        content = densify(read_onnx(model.path).model)
    else:
        tensors = {name: model.tensor(name) for name in model.graph.parameters}
        content = to_onnx(model.graph, tensors, encoding="dense")
    dense = folder / "dense.onnx"
    dense.write_bytes(content.SerializeToString())
    return dense


def _inputs(model: Model, batch: int) -> Array:
    """Random numbers of the shape that the model takes.

    Raises:
        UsageError: the model leaves a size open that is not the batch.
    """
    value = model.graph.inputs[0]
    if None in value.shape[1:] or 0 in value.shape[1:]:
        raise UsageError(f"the model takes inputs of any size {value.shape[1:]}; bench needs one of a fixed size.")
    shape = [n for n in value.shape[1:] if n is not None]
    return np.random.default_rng(0).standard_normal((batch, *shape)).astype(value.dtype)


def _latency(
    ours: Session, dense: Path, x: Array, settings: Settings
) -> tuple[dict[str, Any], dict[str, float | None]]:
    """Both in turns: seconds and ratios, and how far their outputs are apart."""
    from exporters.onnx.session import OnnxSession

    theirs = OnnxSession(dense, threads=settings.threads, spinning=False)
    found, expected = ours.run(x), theirs.run(x)
    pairs = paired(lambda: ours.run(x), lambda: theirs.run(x), settings.rounds)
    ratios = [dense_s / ours_s for ours_s, dense_s in pairs]
    latency = {
        "ours_s": spread([ours_s for ours_s, _ in pairs]),
        "dense_s": spread([dense_s for _, dense_s in pairs]),
        "ratio": spread(ratios),
        "verdict": _verdict(spread(ratios)),
    }
    return latency, _compared(found, expected)


def _compared(found: Array, expected: Array) -> dict[str, float | None]:
    """The largest difference of outputs, and the largest output; None where some are not finite."""
    if not (np.isfinite(found).all() and np.isfinite(expected).all()):
        return {"largest_difference": None, "scale": None}
    difference = np.abs(found - expected).max(initial=0.0)
    return {"largest_difference": float(difference), "scale": float(np.abs(expected).max(initial=0.0))}


def paired(one: Callable[[], object], other: Callable[[], object], rounds: int) -> list[tuple[float, float]]:
    """Seconds of two functions that take turns; which begins changes from round to round."""
    pairs = []
    for index in range(rounds + _WARM_UP):
        seconds = {}
        for function in (one, other) if index % 2 else (other, one):
            function()
            start = time.perf_counter()
            function()
            seconds[function] = time.perf_counter() - start
        pairs.append((seconds[one], seconds[other]))
    return pairs[_WARM_UP:]


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median and the quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def _verdict(ratio: dict[str, float]) -> str:
    """`faster` or `slower` where both quartiles say so."""
    if ratio["low"] > 1:
        return "faster"
    return "slower" if ratio["high"] < 1 else "even"


def _of_children(request: Request) -> Measured:
    """The median of each measure over some child processes."""
    results = [measure(request) for _ in range(_CHILDREN)]
    names = Measured.__dataclass_fields__
    medians = {name: statistics.median(getattr(result, name) for result in results) for name in names}
    return Measured(**medians)
