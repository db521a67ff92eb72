"""Time of a plan inside ONNX Runtime beside the same plan in a session of ours.

Masks and weights are random, as in inference.py. Three sides take turns in one process on the same input: the plan by
the library for C programs, ONNX Runtime with bound inputs and outputs, and its plain `run`. A ratio is the time inside
ONNX Runtime divided by that of the plan alone in the same round: the median, and the quartiles in parentheses. With one
thread, times are processor time of that thread.

Run: python benchmarks/native_onnx.py [--models resnet50] [--threads 1] [--rounds 40]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
from inference import Row, fill_zeros

from converters.conversion import convert
from dsr_tool.runtime.deploy.plan import PlanFile
from dsr_tool.sparsity.tensor import Array
from exporters.export import export
from exporters.onnx.native import plan_of
from exporters.onnx.session import onnx_session


def bound(session: onnxruntime.InferenceSession, x: Array) -> onnxruntime.IOBinding:
    """Binds an input, and outputs that stay where they are."""
    binding = session.io_binding()
    binding.bind_ortvalue_input(session.get_inputs()[0].name, onnxruntime.OrtValue.ortvalue_from_numpy(x))
    for value in session.get_outputs():
        binding.bind_ortvalue_output(
            value.name, onnxruntime.OrtValue.ortvalue_from_shape_and_type(value.shape, np.float32)
        )
    return binding


def seconds(runs: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Times all sides in turns; returns their seconds, one for each round."""
    names, times = list(runs), {name: list[float]() for name in runs}
    for index in range(rounds):
        # Each round begins with the next one, so none always runs right after the same other.
        for name in names[index % len(names) :] + names[: index % len(names)]:
            runs[name]()  # brings its own weights back into the caches
            start = clock()
            runs[name]()
            times[name].append(clock() - start)
    return times


def print_row(row: Row, arguments: argparse.Namespace) -> None:
    """Measures a model and prints its line."""
    path = arguments.folder / f"{row.model}-native.onnx"
    if not path.exists():
        model = convert(row.model, sparsity=row.sparsity, distribution=row.distribution, seed=0)
        fill_zeros(model)
        export(model, path, encoding="native")
    x = np.random.default_rng(0).standard_normal((row.batch, 3, 224, 224)).astype(np.float32)
    plan = PlanFile(plan_of(path), arguments.threads)
    session = onnx_session(path, threads=arguments.threads)
    feed, binding = {session.get_inputs()[0].name: x}, bound(session, x)
    runs = {
        "plan": lambda: plan.run(x),
        "bound": lambda: session.run_with_iobinding(binding),
        "run": lambda: session.run(None, feed),
    }
    expected = next(iter(plan.run(x).values()))
    if not expected.any() or session.run(None, feed)[0].tobytes() != expected.tobytes():
        raise SystemExit(f"{path} does not compute in ONNX Runtime what its plan computes.")
    times = seconds(runs, arguments.rounds, time.thread_time if arguments.threads == 1 else time.perf_counter)
    plan_ms = 1e3 * statistics.median(times["plan"])
    print(f"{row.model:13} {row.distribution:8} {row.sparsity:5.2f} {plan_ms:8.3f}", end="")
    for name in ("bound", "run"):
        ratios = [one / other for one, other in zip(times[name], times["plan"], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        print(f"   {median:.3f} ({low:.3f}-{high:.3f})", end="")
    print(flush=True)


def main() -> None:
    """Prints a line for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet50", "mobilenet_v2"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--folder", type=Path, help="keep the models in this folder for the next run")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        arguments.folder = arguments.folder or Path(folder)
        arguments.folder.mkdir(parents=True, exist_ok=True)
        print(f"onnxruntime {onnxruntime.__version__}, {arguments.threads} threads")
        print(f"{'model':13} {'masks':8} {'zeros':>5} {'plan ms':>8}   {'bound / plan':19}   run / plan")
        for name in arguments.models:
            print_row(Row(name, "uniform", 0.9, 1, 0, 0), arguments)


if __name__ == "__main__":
    main()
