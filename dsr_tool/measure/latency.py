"""Latency, loading time and memory of the sparse runtime beside ONNX Runtime on the dense model.

Both take turns in one process on the same input, and ratios are computed pair by pair, so a machine that slows down
slows both. Each turn runs twice and times the second run, because the other one's turn has pushed the weights out of
the caches. Loading time and memory come from child processes that load and run one of the two alone. ONNX Runtime's
threads do not spin while they wait, since they would take cores from the turn that is timed.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsr_tool.errors import UsageError, unknown_name
from dsr_tool.files import require_file, temporary_folder
from dsr_tool.measure.latency_layers import measure_layers
from dsr_tool.measure.latency_schema import BenchDocument, Latency, Outputs
from dsr_tool.measure.memory.process import Measured, Request, can_measure, measure
from dsr_tool.measure.pairs import paired, spread, verdict
from dsr_tool.runtime import Session
from dsr_tool.runtime.kernels.library import level
from dsr_tool.runtime.source import Model, open_model
from dsr_tool.sparsity.tensor import Array

__all__ = ["RUNTIMES", "Settings", "bench_document", "measure_latency", "open_session"]

RUNTIMES = ("sparse", "scipy")
"""The runtimes that are measured against the dense model: the one that users run, and its reference alone."""

_MAX_BATCH, _MAX_ROUNDS = 1024, 10_000
"""Largest batch, and most pairs of runs; more is a typing error rather than a plan."""

_MIN_ROUNDS = 4
"""Fewest pairs of runs that have quartiles."""

_CHILDREN = 3
"""Child processes per side; the document has the median of each figure."""


@dataclass(frozen=True)
class Settings:
    """The settings of a benchmark.

    Attributes:
        batch: inputs at once.
        threads: number of worker threads of each side.
        rounds: number of pairs of timed runs.
        runtime: our side, one of `RUNTIMES`.
        layers: whether each op is timed too.
    """

    batch: int = 1
    threads: int = 1
    rounds: int = 20
    runtime: str = "sparse"
    layers: bool = False

    def check(self) -> None:
        """Raises `UsageError` for a value that is not allowed."""
        cores = os.cpu_count() or 1
        if self.runtime not in RUNTIMES:
            raise unknown_name("--runtime", self.runtime, RUNTIMES)
        if self.layers and self.runtime != "sparse":
            raise UsageError(f"--layers times the kernels, which --runtime {self.runtime} does not run; leave one out.")
        for name, value, least, most, unit in (
            ("--batch", self.batch, 1, _MAX_BATCH, "inputs at once"),
            ("--threads", self.threads, 1, cores, "threads, at most one per core"),
            ("--rounds", self.rounds, _MIN_ROUNDS, _MAX_ROUNDS, "rounds"),
        ):
            if not least <= value <= most:
                raise UsageError(f"{name} {value} is not in {least} to {most:,}; give the number of {unit}.")


def bench_document(path: Path, settings: Settings, say: Callable[[str], None] = lambda _: None) -> BenchDocument:
    """Measures a file.

    Args:
        path: an archive or an ONNX file.
        settings: batch, threads, rounds and runtime.
        say: is called with a note whenever a new stage begins.

    Raises:
        FileError: the file does not exist.
        FormatError: the file is damaged.
        UsageError: a setting is not allowed, or one of the two runtimes does not support the model.
    """
    settings.check()
    require_file(path, "FILE")
    model = open_model(path)
    x = _inputs(model, settings.batch)
    with temporary_folder() as folder:
        say("writing the dense model")
        dense = _dense(model, folder)
        say(f"running both, {settings.rounds} rounds")
        # Prepared for this batch, so that compiling it is not part of the first run.
        ours = open_session(model, settings.runtime, settings.batch, settings.threads)
        latency, outputs = _latency(ours, dense, x, settings)
        layers = None
        if settings.layers:
            say("timing each op")
            layers = measure_layers(model, x, settings.threads, settings.rounds)
        children: dict[str, Measured] = {}
        if can_measure():
            # In this process both are loaded, and each would count the memory of the other.
            say("loading and running each in processes of its own")
            for name, kind, file in (("ours", settings.runtime, path), ("dense", "onnxruntime", dense)):
                children[name] = _child_medians(Request(kind, str(file), x.shape, threads=settings.threads))
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
            "fallback": ours.coverage.to_dict() if ours.coverage else None,
            "latency": latency,
            "outputs": outputs,
            # Empty dicts would read as measurements without sides.
            "load_s": {name: child.load_s for name, child in children.items()} or None,
            "loaded_bytes": {name: child.ready_bytes for name, child in children.items()} or None,
            "peak_bytes": {name: child.peak_bytes for name, child in children.items()} or None,
            "layers": layers,
        }


def measure_latency(path: Path, settings: Settings) -> Latency:
    """Times a file beside its dense model, without the loading times and memory that `bench_document` adds.

    Raises:
        FormatError: the file is damaged.
        UsageError: as `bench_document`.
    """
    settings.check()
    with temporary_folder() as folder:
        model = open_model(path)
        ours = open_session(model, settings.runtime, settings.batch, settings.threads)
        return _latency(ours, _dense(model, folder), _inputs(model, settings.batch), settings)[0]


def open_session(source: Model | str | Path, runtime: str, batch: int, threads: int) -> Session:
    """Opens a session of the sparse runtime.

    Args:
        source: an archive or ONNX file, or what `open_model` returned for one.
        runtime: one of `RUNTIMES`.
        batch: inputs at once.
        threads: number of worker threads.
    """
    return Session(source, threads=threads, batch=batch, runtime="scipy" if runtime == "scipy" else "auto")


def _dense(model: Model, folder: Path) -> Path:
    """Writes the dense model as an ONNX file; an ONNX file keeps its nodes, and only its weights become dense."""
    from exporters.containers import container_of
    from exporters.onnx.densify import densify
    from exporters.onnx.read import read_onnx
    from exporters.onnx.write import to_onnx

    if container_of(model.path).name == "onnx":
        # Translating the graph to ours and back could change what ONNX Runtime fuses.
        content = densify(read_onnx(model.path).model)
    else:
        tensors = {name: model.tensor(name) for name in model.graph.parameters}
        content = to_onnx(model.graph, tensors, encoding="dense")
    dense = folder / "dense.onnx"
    dense.write_bytes(content.SerializeToString())
    return dense


def _inputs(model: Model, batch: int) -> Array:
    """Returns standard normal inputs of the shape that the model takes, from a fixed seed.

    Raises:
        UsageError: a dimension other than the batch has no fixed size.
    """
    value = model.graph.inputs[0]
    if None in value.shape[1:] or 0 in value.shape[1:]:
        raise UsageError(f"the model takes inputs of any size {value.shape[1:]}; export it with a fixed input size.")
    # Random, not zero: the outputs are compared, and zeros would hide differences.
    shape = [n for n in value.shape[1:] if n is not None]
    return np.random.default_rng(0).standard_normal((batch, *shape)).astype(value.dtype)


def _latency(ours: Session, dense: Path, x: Array, settings: Settings) -> tuple[Latency, Outputs]:
    """Times both sides in turns and compares their outputs."""
    from exporters.onnx.session import OnnxSession

    theirs = OnnxSession(dense, threads=settings.threads, spinning=False)
    # Before the clock starts: the first run of ONNX Runtime also lays out its memory.
    result, expected = ours.run_all(x), theirs.run_all(x)
    pairs = paired(lambda: ours.run(x), lambda: theirs.run(x), settings.rounds)
    ratios = [dense_s / ours_s for ours_s, dense_s in pairs]
    latency: Latency = {
        "ours_s": spread([ours_s for ours_s, _ in pairs]),
        "dense_s": spread([dense_s for _, dense_s in pairs]),
        "ratio": spread(ratios),
        "verdict": verdict(spread(ratios)),
    }
    return latency, _compare(result, expected)


def _compare(result: Mapping[str, Array], expected: Mapping[str, Array]) -> Outputs:
    """Compares every output of both sides; returns the one whose difference is the largest part of its scale."""
    if not all(np.isfinite(array).all() for side in (result, expected) for array in side.values()):
        return {"largest_difference": None, "scale": None}
    found = []
    for name, array in expected.items():
        exact = np.asarray(array, np.float64)  # an output may hold bytes or truth values, which have no difference
        # It may also be empty, and then has no largest entry.
        found.append((np.abs(result[name] - exact).max(initial=0.0), np.abs(exact).max(initial=0.0)))
    difference, scale = max(found, key=lambda one: one[0] / max(one[1], np.finfo(np.float64).tiny))
    return {"largest_difference": float(difference), "scale": float(scale)}


def _child_medians(request: Request) -> Measured:
    """Returns the median of each figure over several child processes."""
    # Figure by figure: the child with the median time need not be the one with the median memory.
    results = [measure(request) for _ in range(_CHILDREN)]
    names = Measured.__dataclass_fields__
    medians = {name: statistics.median(getattr(result, name) for result in results) for name in names}
    return Measured(**medians)
