"""ONNX files by encoding: size, load time, memory and latency against the dense file; and what session presets change.

Latency is of pairs: the dense file and the other one take turns in one process with one thread, and the ratio is of
each pair, so that a drifting machine moves both. The ratio to hold is 1.03; the first row, the dense file against
itself, says how far the measurement can be trusted. Times are of the processor, which with one thread are those of the
clock less what other processes take. Memory is the peak (VmHWM) of a child process that loads the file and runs it,
less that of one that runs a file of a few bytes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

from converters.conversion import convert
from dsr_tool.sparse.trace import trace
from exporters.onnx.write import ONNX_ENCODINGS, to_onnx
from exporters.onnx.session import PRESETS, onnx_session

VARIANTS = [("dense", "fp32")] + [
    (e, v) for v in ("fp32", "fp16") for e in ONNX_ENCODINGS if (e, v) != ("dense", "fp32")
]
CHILD = """
import sys, time, json, numpy
from exporters.onnx.session import onnx_session
start = time.process_time()
session = onnx_session(sys.argv[1], preset=sys.argv[2], threads=1)
load = time.process_time() - start
x = numpy.zeros(json.loads(sys.argv[3]), numpy.float32)
times = []
for _ in range(int(sys.argv[4])):
    start = time.process_time()
    session.run(None, {"input": x})
    times.append(time.process_time() - start)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
kilobytes = {name: int(status[name].split()[0]) for name in ("VmHWM", "VmRSS")}
print(json.dumps({"load_s": load, "ms": 1e3 * sorted(times)[len(times) // 2], **kilobytes}))
"""


def write_files(architecture: str, sparsity: float, folder: Path) -> tuple[dict[tuple[str, str], Path], list[int]]:
    """One file for each encoding and type of values, and the shape of one input."""
    model = convert(architecture, sparsity=sparsity, distribution="erk", seed=0)
    graph = trace(model.module, model.config.input_shape)
    files = {}
    for encoding, values in VARIANTS:
        path = folder / f"{encoding}-{values}.onnx"
        content = to_onnx(graph, model.tensors(), encoding=encoding, values=values, specs=model.specs)
        path.write_bytes(content.SerializeToString(deterministic=True))
        files[encoding, values] = path
    return files, [1, *model.config.input_shape]


def small_file(folder: Path) -> Path:
    """A file without weights, for what a process takes that only runs ONNX Runtime."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("input", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["input"], ["y"])], "g", values[:1], values[1:])
    path = folder / "small.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


def in_child(path: Path, shape: list[int], preset: str, runs: int) -> dict[str, float]:
    """Load and run a file in a process of its own; kilobytes as the kernel counts them."""
    command = [sys.executable, "-c", CHILD, str(path), preset, json.dumps(shape), str(runs)]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def median_of_children(path: Path, shape: list[int], preset: str, repeats: int) -> dict[str, float]:
    """The median of each measure over some children."""
    results = [in_child(path, shape, preset, 8) for _ in range(repeats)]
    return {name: statistics.median(result[name] for result in results) for name in results[0]}


def ratios(
    dense: onnxruntime.InferenceSession, other: onnxruntime.InferenceSession, shape: list[int], rounds: int
) -> list[float]:
    """Sorted ratios of the latency of two sessions that take turns."""
    x = {"input": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    found = []
    for index in range(rounds + 2):
        seconds = {}
        for session in (dense, other) if index % 2 else (other, dense):
            start = time.process_time()
            session.run(None, x)
            seconds[session] = time.process_time() - start
        if index >= 2:
            found.append(seconds[other] / seconds[dense])
    return sorted(found)


def main() -> None:
    """Print both tables for one model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("architecture", nargs="?", default="resnet50")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files, shape = write_files(arguments.architecture, arguments.sparsity, folder)
        base = median_of_children(small_file(folder), shape, "latency", arguments.repeats)["VmHWM"]
        print(
            f"{arguments.architecture} at sparsity {arguments.sparsity} (ERK), input {shape}, one thread, onnxruntime "
            f"{onnxruntime.__version__}; {base / 1e3:.0f} MB of the process itself are taken off"
        )
        dense = onnx_session(files["dense", "fp32"], threads=1)
        print("encoding values      MB  load s  peak MB  latency / dense (quartiles)")
        for (encoding, values), path in files.items():
            found = ratios(dense, onnx_session(path, threads=1), shape, arguments.rounds)
            child = median_of_children(path, shape, "latency", arguments.repeats)
            quarter = len(found) // 4
            print(
                f"{encoding:8} {values:6} {path.stat().st_size / 1e6:7.2f} {child['load_s']:7.2f} "
                f"{(child['VmHWM'] - base) / 1e3:8.0f}  {statistics.median(found):.3f} "
                f"({found[quarter]:.3f} to {found[-1 - quarter]:.3f})",
                flush=True,
            )
        print("\npreset    file        load s  peak MB  resident MB      ms")
        for preset in PRESETS:
            for encoding, values in (("dense", "fp32"), ("auto", "fp32"), ("auto", "fp16")):
                child = median_of_children(files[encoding, values], shape, preset, arguments.repeats)
                print(
                    f"{preset:9} {encoding:5} {values:5} {child['load_s']:7.2f} {(child['VmHWM'] - base) / 1e3:8.0f} "
                    f"{(child['VmRSS'] - base) / 1e3:12.0f} {child['ms']:7.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
