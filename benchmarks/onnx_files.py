"""ONNX files by encoding: size, load time, memory and latency against the dense file; and the session presets.

The dense file and the other one take turns in one process with one thread, and ratios are computed pair by pair, so a
machine that slows down slows both. The ratio to hold is 1.03; the first row, the dense file against itself, shows how
far the measurement can be trusted. Times are processor times, which with one thread are wall-clock times without those
of other processes. Memory is the peak (VmHWM) of a child process that loads the file and runs it, minus that of one
that runs a file of a few bytes.
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
from exporters.onnx.session import PRESETS, onnx_session
from exporters.onnx.write import ONNX_ENCODINGS, to_onnx

# The dense file comes first: the others are compared with it.
VARIANTS = [("dense", "fp32")] + [
    (e, v) for v in ("fp32", "fp16") for e in ONNX_ENCODINGS if (e, v) != ("dense", "fp32")
]
# A process for each file: memory that ONNX Runtime took for an earlier one would count too.
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
    """Writes a file for each encoding and type of values; returns them with the shape of one input."""
    model = convert(architecture, sparsity=sparsity, distribution="erk", seed=0)
    # Traced once for all files, and not verified: the tests do that.
    graph = trace(model.module, model.config.input_shape)
    files = {}
    for encoding, values in VARIANTS:
        path = folder / f"{encoding}-{values}.onnx"
        content = to_onnx(graph, model.tensors(), encoding=encoding, values=values, specs=model.specs)
        path.write_bytes(content.SerializeToString(deterministic=True))
        files[encoding, values] = path
    return files, [1, *model.config.input_shape]


def small_file(folder: Path) -> Path:
    """Writes a file without weights, to measure the memory of ONNX Runtime itself."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("input", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["input"], ["y"])], "g", values[:1], values[1:])
    path = folder / "small.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


def in_child(path: Path, shape: list[int], preset: str, runs: int) -> dict[str, float]:
    """Loads and runs a file in a process of its own; memory is in kilobytes, as Linux counts them."""
    command = [sys.executable, "-c", CHILD, str(path), preset, json.dumps(shape), str(runs)]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def median_of_children(path: Path, shape: list[int], preset: str, repeats: int) -> dict[str, float]:
    """Returns the median of each figure over several child processes."""
    results = [in_child(path, shape, preset, 8) for _ in range(repeats)]
    return {name: statistics.median(result[name] for result in results) for name in results[0]}


def ratios(
    dense: onnxruntime.InferenceSession, other: onnxruntime.InferenceSession, shape: list[int], rounds: int
) -> list[float]:
    """Returns sorted ratios other / dense of the latency of two sessions that take turns."""
    x = {"input": np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    result = []
    for index in range(rounds + 2):
        seconds = {}
        # The side that begins alternates, so neither always runs in the state that the other one leaves.
        for session in (dense, other) if index % 2 else (other, dense):
            start = time.process_time()
            session.run(None, x)
            seconds[session] = time.process_time() - start
        if index >= 2:  # the first rounds allocate
            result.append(seconds[other] / seconds[dense])
    return sorted(result)


def main() -> None:
    """Prints both tables for one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architecture", nargs="?", default="resnet50")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--rounds", type=int, default=40, help="pairs of timed runs per file; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="child processes per figure; default: %(default)s")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files, shape = write_files(arguments.architecture, arguments.sparsity, folder)
        # The interpreter, numpy and ONNX Runtime's own code, which every row would contain.
        base = median_of_children(small_file(folder), shape, "latency", arguments.repeats)["VmHWM"]
        print(
            f"{arguments.architecture} at sparsity {arguments.sparsity} (ERK), input {shape}, one thread, onnxruntime "
            f"{onnxruntime.__version__}; {base / 1e3:.0f} MB of the process itself are subtracted"
        )
        dense = onnx_session(files["dense", "fp32"], threads=1)
        print("encoding values      MB  load s  peak MB  latency / dense (quartiles)")
        for (encoding, values), path in files.items():
            pairs = ratios(dense, onnx_session(path, threads=1), shape, arguments.rounds)
            child = median_of_children(path, shape, "latency", arguments.repeats)
            quarter = len(pairs) // 4
            print(
                f"{encoding:8} {values:6} {path.stat().st_size / 1e6:7.2f} {child['load_s']:7.2f} "
                f"{(child['VmHWM'] - base) / 1e3:8.0f}  {statistics.median(pairs):.3f} "
                f"({pairs[quarter]:.3f} to {pairs[-1 - quarter]:.3f})",
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
