"""One model in every way to deploy it: bytes of the file, time to load, memory, and latency against ONNX Runtime.

Masks and weights are random; the first convolution is dense, all other weights are equally sparse. The reference is
ONNX Runtime on the dense file. All ways take turns on one input in one process; each turn runs twice and times the
second run. A ratio is the reference's time divided by that of the way in the same round, so more is faster: the
median, and the quartiles in parentheses. Time to load and resident memory are those of child processes, one for each
way in turn: the file is in the page cache, and memory is counted above that of the same process before it opens the
file, after a small model has run in the same way. Times to load are processor times: loading takes one thread, so that
is wall-clock time without that of other processes. Each way must give the reference's answer.

Run: python benchmarks/deploy.py [--model resnet50] [--sparsity 0.9] [--threads 1] [--folder FILES]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from machine import processor

from dsr_tool.measure.memory.process import ENVIRONMENT, held_bytes, reset_peak
from dsr_tool.measure.pairs import spread
from dsr_tool.sparsity.tensor import Array

Run = Callable[[Array], Array]
_RUNS = 3
"""Runs before memory is read: ONNX Runtime lays out its memory in the second one."""
_SMALL = "mobilenet_v2"
"""Small model that is run before memory is counted."""


@dataclass(frozen=True)
class Way:
    """A way to deploy a model.

    Attributes:
        title: name in the table.
        ending: end of the name of its file.
        options: options of the export.
        load: loads a file for a number of threads; its result has no run where the user writes the computation.
        timed: False if its latency is not measured.
    """

    title: str
    ending: str
    options: dict[str, object]
    load: Callable[[Path, int], object]
    timed: bool = True


def _session(path: Path, threads: int) -> object:
    from dsr_tool.runtime import Session

    return Session(path, threads=threads, runtime="native")


def _reference(path: Path, threads: int) -> object:
    from dsr_tool.runtime import Session

    return Session(path, threads=threads, runtime="scipy")


def _onnxruntime(path: Path, threads: int) -> object:
    from exporters.onnx.session import OnnxSession

    return OnnxSession(path, threads=threads, spinning=False)


class _Plan:
    """A plan in the library for C programs, called as a C program calls it."""

    def __init__(self, path: Path, threads: int) -> None:
        from dsr_tool.runtime.deploy.plan import PlanFile

        self._plan = PlanFile(path, threads)

    def run(self, x: Array) -> Array:
        """Returns the first output."""
        return next(iter(self._plan.run(x).values()))


def _matrices(path: Path, threads: int) -> object:  # noqa: ARG001 - scipy's products use one
    """Reads a .npz file with numpy and scipy alone, as docs/format.md shows."""
    from scipy.sparse import csr_matrix

    with np.load(path, allow_pickle=False) as file:
        names = [name[:-5] for name in file.files if name.endswith(":data")]
        parts = {name: [file[f"{name}:{part}"] for part in ("data", "indices", "indptr", "shape")] for name in names}
        dense = {name: file[name] for name in file.files if ":" not in name}
    return {name: csr_matrix(tuple(part[:3]), part[3]) for name, part in parts.items()} | dense


WAYS = [
    Way("ONNX Runtime, dense file", "dense.onnx", {"encoding": "dense"}, _onnxruntime),
    Way("ONNX Runtime, compact file", "compact.onnx", {}, _onnxruntime),
    Way("ONNX Runtime, our operator", "native.onnx", {"encoding": "native"}, _onnxruntime),
    Way("dsr.h, plan", "dsrplan", {}, _Plan),
    Way("dsr.h, plan of int8 values", "int8.dsrplan", {"values": "int8"}, _Plan),
    Way("Session, archive", "dsr", {}, _session),
    Way("Session, archive of int8 values", "int8.dsr", {"values": "int8"}, _session),
    Way("Session on scipy, archive", "dsr", {}, _reference, timed=False),
    Way("scipy alone, matrices", "npz", {}, _matrices, timed=False),
]
"""The reference comes first."""


def write(model: str, sparsity: float, folder: Path) -> dict[str, Path]:
    """Writes the files of a model that are not there yet; returns them by ending.

    They are not verified one by one, which takes minutes: each way must give the reference's answer anyway.
    """
    from inference import fill_zeros, first_convolution

    from converters.conversion import convert
    from exporters.base import ExportOptions
    from exporters.checked import CheckedModel
    from exporters.containers import CONTAINERS

    files = {way.ending: folder / f"{model}-{sparsity:g}.{way.ending}" for way in WAYS}
    missing = {way.ending: way.options for way in WAYS if not files[way.ending].exists()}
    if missing:
        # As in the uniform models of Evci et al. 2020 (RigL), whose first layer is dense.
        first = [first_convolution(model)]
        converted = convert(model, sparsity=sparsity, distribution="uniform", seed=0, keep_dense=first)
        fill_zeros(converted)
        # Captured once for all files.
        checked = {values: CheckedModel(converted, values) for values in ("fp32", "int8")}
        checked["int8"].__dict__["graph"] = checked["fp32"].graph
        for ending, options in missing.items():
            asked = ExportOptions(**options)  # type: ignore[arg-type]
            container = next(one for one in CONTAINERS.values() if f".{ending.split('.')[-1]}" in one.endings)
            container.encode(checked[asked.values], asked).write(files[ending])
    return files


def shape_of(archive: Path) -> tuple[int, ...]:
    """Returns the shape of one input of a model, as a batch of one."""
    from dsr_tool.formats.archive import open_archive

    return (1, *open_archive(archive).config.input_shape)


def in_child(way: Way, files: dict[str, Path], small: dict[str, Path], threads: int) -> dict[str, float]:
    """Loads and runs a file in a process of its own; returns seconds to load, and bytes loading and running."""
    shapes = [shape_of(one["dsr"]) for one in (small, files)]
    given = [way.title, str(small[way.ending]), str(files[way.ending]), json.dumps(shapes), str(threads)]
    done = subprocess.run(
        [sys.executable, __file__, "--child", *given],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def child(title: str, small: str, path: str, shapes: str, threads: str) -> None:
    """Prints the figures of one way; runs in a child process."""
    import gc

    way = next(one for one in WAYS if one.title == title)
    inputs = [np.zeros(shape, np.float32) for shape in json.loads(shapes)]
    run_often(way.load(Path(small), int(threads)), inputs[0])
    gc.collect()
    reset_peak()
    base, start = held_bytes("VmRSS"), time.process_time()
    loaded = way.load(Path(path), int(threads))
    load_s, peak = time.process_time() - start, held_bytes("VmHWM")
    run_often(loaded, inputs[1])
    gc.collect()
    print(json.dumps({"load_s": load_s, "peak_bytes": peak - base, "held_bytes": held_bytes("VmRSS") - base}))


def run_often(loaded: object, x: Array) -> None:
    """Runs what can be run."""
    for _ in range(_RUNS if hasattr(loaded, "run") else 0):
        loaded.run(x)


def latencies(files: dict[str, Path], threads: int, rounds: int) -> dict[str, list[float]]:
    """Returns the seconds of all ways that are timed, round by round.

    Raises:
        SystemExit: a way gives another answer than the reference; weights in few bits may be some way off.
    """
    # Here and above, since it imports torch, which a child process need not load.
    from inference import seconds

    x = np.random.default_rng(0).standard_normal(shape_of(files["dsr"])).astype(np.float32)
    runs: dict[str, Run] = {way.title: way.load(files[way.ending], threads).run for way in WAYS if way.timed}  # type: ignore[attr-defined]
    expected = runs[WAYS[0].title](x)
    for way in WAYS:
        if way.timed:
            error = np.abs(runs[way.title](x) - expected).max() / np.abs(expected).max()
            if not error < (0.1 if "values" in way.options else 1e-4):
                raise SystemExit(f"{way.title} differs from {WAYS[0].title} by {error:.1e} of the largest output.")
    return seconds(dict(runs), x, rounds)


def cell(values: list[float], form: str = ".2f") -> str:
    """Returns the median, and the quartiles in parentheses."""
    figures = spread(values)
    return f"{figures['median']:{form}} ({figures['low']:{form}}-{figures['high']:{form}})"


def main() -> None:
    """Prints the table, in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20, help="rounds of timed runs; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="child processes of each way; default: %(default)s")
    parser.add_argument("--folder", type=Path, help="keep the files in this folder for the next run")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(*arguments.child)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        files, small = write(arguments.model, arguments.sparsity, folder), write(_SMALL, arguments.sparsity, folder)
        packages = ", ".join(f"{name} {version(name)}" for name in ("onnxruntime", "scipy"))
        print(f"{arguments.model}, sparsity {arguments.sparsity:g} uniform, batch 1, {arguments.threads} thread(s)")
        print(f"{processor()}, {os.cpu_count()} cores, {platform.machine()}; {packages}\n")
        print("| way | file MB | load ms | peak of loading MB | resident MB | ms | times ONNX Runtime, dense |")
        print("|---|---|---|---|---|---|---|", flush=True)
        # In turns, so that a slow minute of the machine is shared by all.
        turns = [[in_child(way, files, small, arguments.threads) for way in WAYS] for _ in range(arguments.repeats)]
        times = latencies(files, arguments.threads, arguments.rounds)
        for index, way in enumerate(WAYS):
            figures = {name: [turn[index][name] for turn in turns] for name in turns[0][index]}
            own = times.get(way.title)
            ratios = [d / t for d, t in zip(times[WAYS[0].title], own, strict=True)] if own else []
            cells = [
                f"{files[way.ending].stat().st_size / 1e6:.2f}",
                cell([1e3 * one for one in figures["load_s"]], ".0f"),
                *(f"{statistics.median(figures[name]) / 1e6:.1f}" for name in ("peak_bytes", "held_bytes")),
                f"{1e3 * statistics.median(own):.1f}" if own else "-",
                cell(ratios) if own else "-",
            ]
            print(f"| {way.title} | {' | '.join(cells)} |")
    return None


if __name__ == "__main__":
    main()
