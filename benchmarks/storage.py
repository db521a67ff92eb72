"""Bytes of a sparse ResNet-50 on disk, and the cost of writing and reading it, beside other formats.

Two tables are printed for each sparsity. The first splits our archive into its parts, beside the entropy bound of the
masks and beside B4 (B2): that bound, four (two) bytes per active weight, and everything else raw. The second has our
archive and other formats, each written and read back to dense arrays in child processes with one thread on one core.
Times are medians over rounds in which the formats take turns, from arrays to file and back, checksums included where a
format has them. Memory is the peak of the child (VmHWM) above its resident memory before. Every file is read back and
compared with what was written.

`storage_item.py` describes how the weights are drawn.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from storage_formats import FORMATS, Item

from dsr_tool.formats.archive import open_archive
from dsr_tool.measure.memory.process import held_bytes

REPEATS = 3
"""Timed writes or reads in one child; the median counts."""


def main() -> None:
    """Measures and prints; with `--child`, the benchmark's own child process writes or reads one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.8, 0.9, 0.95, 0.98])
    parser.add_argument("--draw", choices=("laplace", "normal", "whole"), default="laplace")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slow", action="store_true", help="also zstd -19, which takes half a minute per round")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", nargs=3, metavar=("FORMAT", "ITEM", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(*arguments.child)))
        return
    document = []
    for sparsity in arguments.sparsity:
        result = measure(sparsity, arguments.draw, arguments.seed, arguments.rounds, slow=arguments.slow)
        document.append(result)
        if not arguments.json:
            show(result)
    if arguments.json:
        print(json.dumps({"schema": "dsr-tool/benchmark-storage/1", "draw": arguments.draw, "items": document}))


def measure(sparsity: float, draw: str, seed: int, rounds: int, *, slow: bool) -> dict[str, Any]:
    """Returns all figures of one sparsity as plain values."""
    from storage_item import make

    item = make(sparsity, draw, seed)
    # Only for float32: archives of float16 round, so their arrays differ from these.
    sums = {4: _checksum({name: tensor.to_dense() for name, tensor in item.tensors.items()})}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name, form in FORMATS.items() if slow or not form.slow}
    with tempfile.TemporaryDirectory() as folder:
        source, file = Path(folder) / "item", Path(folder) / "file"
        # Drawn once and passed as a file, so that all formats store the same model.
        source.write_bytes(pickle.dumps(item))
        for _ in range(rounds):
            for name, past in runs.items():
                past.append(_run_children(name, source, file))
                if name.startswith("archive"):
                    past[-1]["parts"] = parts(item, file, FORMATS[name].width)
    expected = {name: sums.get(FORMATS[name].width) for name in runs}
    wrong = [name for name, past in runs.items() if "sum" in past[0] and expected[name] not in (None, past[0]["sum"])]
    if wrong:
        sys.exit(f"{wrong[0]}: the arrays that were read differ from those that were written")
    return {
        "sparsity": sparsity,
        "dense_bytes": sum(tensor.mask.size * tensor.values.itemsize for tensor in item.tensors.values()),
        "bound_bytes": item.bound_bytes,
        "b4_bytes": item.reference_bytes(4),
        "b2_bytes": item.reference_bytes(2),
        "formats": {name: _medians(past) for name, past in runs.items()},
    }


def parts(item: Item, path: Path, width: int) -> dict[str, float]:
    """Returns the bytes of an archive by part: masks, values, dense rest, documents."""
    archive = open_archive(path)
    sparse = {name: entry for name, entry in archive.entries.items() if entry.spec.role == "sparse"}
    values = sum(
        archive.stored_bytes(entry.stream(suffix))
        for entry in sparse.values()
        for suffix in entry.crc32.keys() & {"values", ""}
    )
    weights = sum(archive.entry_bytes(name) for name in sparse)
    documents = archive.document_bytes + archive.header_bytes
    return {
        "mask_bytes": weights - values,
        "values_bytes": values,
        "rest_bytes": archive.nbytes - weights - documents,
        "documents_bytes": documents,
        "file_bytes": archive.nbytes,
        "mask_to_bound": (weights - values) / item.bound_bytes,
        "file_to_reference": archive.nbytes / item.reference_bytes(width),
    }


def child(name: str, source: str, file: str) -> dict[str, Any]:
    """Writes a file of one format, if an item is given as its source, or reads it; on one core."""
    # By affinity, since not every library heeds the variables for numbers of threads.
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    form, path = FORMATS[name], Path(file)
    for library in form.libraries:
        importlib.import_module(library)  # not part of any time or memory below
    if source:
        item = pickle.loads(Path(source).read_bytes())  # noqa: S301 - our own parent wrote it
        form.write(item, path)  # not timed: a first call allocates
        return {"write_s": _seconds(lambda: form.write(item, path)), "file_bytes": path.stat().st_size}
    before = held_bytes("VmRSS")
    dense = form.read(path)
    result = {"peak_bytes": held_bytes("VmHWM") - before, "sum": _checksum(dense)}
    # Reading once more must not find this memory still taken.
    del dense
    return result | {"read_s": _seconds(lambda: form.read(path))}


def show(result: dict[str, Any]) -> None:
    """Prints the two tables of one sparsity."""
    b4, b2 = result["b4_bytes"], result["b2_bytes"]
    print(f"\nsparsity {result['sparsity']}: bound of the masks {result['bound_bytes'] / 1e6:.3f} MB, ", end="")
    print(f"B4 {b4 / 1e6:.3f} MB, B2 {b2 / 1e6:.3f} MB, dense {result['dense_bytes'] / 1e6:.1f} MB")
    print(f"{'bytes':28}{'mask':>11}{'values':>11}{'dense rest':>11}{'documents':>11}{'file':>11}", end="")
    print(f"{'÷ bound':>9}{'÷ B4 (B2)':>10}")
    for name, figures in result["formats"].items():
        if part := figures.get("parts"):
            columns = ("mask_bytes", "values_bytes", "rest_bytes", "documents_bytes", "file_bytes")
            print(f"{name:28}" + "".join(f"{part[column]:11,}" for column in columns), end="")
            print(f"{part['mask_to_bound']:9.4f}{part['file_to_reference']:10.4f}")
    print(f"{'one core':28}{'MB':>11}{'÷ B4':>11}{'write s':>11}{'read ms':>11}{'peak MB':>11}")
    for name, figures in result["formats"].items():
        if "absent" in figures:
            print(f"{name:28}{'not installed':>22} ({figures['absent']})")
            continue
        size = figures["file_bytes"]
        print(f"{name:28}{size / 1e6:11.2f}{size / b4:11.3f}{figures['write_s']:11.3f}", end="")
        print(f"{figures['read_s'] * 1e3:11.1f}{figures['peak_bytes'] / 1e6:11.1f}")


def _run_children(name: str, source: Path, file: Path) -> dict[str, Any]:
    """Writes and reads in two fresh processes, so that memory of the one does not count for the other."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    figures: dict[str, Any] = {}
    for argument in (str(source), ""):
        command = [sys.executable, __file__, "--child", name, argument, str(file)]
        done = subprocess.run(command, env={**os.environ, **threads}, capture_output=True, text=True, check=False)
        # Formats of packages that are not installed get a line that says so; any other failure ends the benchmark.
        if "ModuleNotFoundError: " in done.stderr:
            return {"absent": done.stderr.strip().splitlines()[-1].removeprefix("ModuleNotFoundError: ")}
        if done.returncode:
            sys.exit(done.stderr)
        figures |= json.loads(done.stdout)
    return figures


def _medians(past: list[dict[str, Any]]) -> dict[str, Any]:
    times = {key: statistics.median(run[key] for run in past) for key in past[0] if key[-2:] == "_s" or "peak" in key}
    return past[0] | times


def _seconds(work: Callable[[], object]) -> float:
    """Returns the median time of several calls."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        result = work()
        times.append(time.perf_counter() - start)
        # After the clock: freeing what was read is not part of reading.
        del result
    return statistics.median(times)


def _checksum(dense: dict[str, Any]) -> int:
    total = 0
    # Sorted, since formats may return their arrays in any order.
    for name in sorted(dense):
        total = zlib.crc32(np.ascontiguousarray(dense[name]), total)
    return total


if __name__ == "__main__":
    main()
