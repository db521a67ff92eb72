"""The time of each op of a model: where a run goes, and how near each op is to what the processor can do."""

from __future__ import annotations

import time

import numpy as np

from dsr_tool.measure.latency_schema import LayerRow, Layers
from dsr_tool.runtime import Session
from dsr_tool.runtime.compiler.summary import OpSummary
from dsr_tool.runtime.kernels.peak import peak
from dsr_tool.runtime.source import Model
from dsr_tool.sparsity.tensor import Array

__all__ = ["measure_layers"]

_WARM_UP_ROUNDS = 2
"""Runs that are not counted, in which memory is allocated."""


def measure_layers(model: Model, x: Array, threads: int, rounds: int) -> Layers:
    """Times every op of a model on the kernels; also of one so dense that `auto` picks ONNX Runtime.

    A clock is read after each op, about 25 ns of a run, and figures are medians over the runs.

    Args:
        model: the model.
        x: the input.
        threads: number of worker threads.
        rounds: number of runs.

    Raises:
        UsageError: there are no kernels here, or they do not support the model.
    """
    session = Session(model, threads=threads, batch=len(x), runtime="native")
    whole, by_op = list[int](), list[list[int]]()
    for index in range(rounds + _WARM_UP_ROUNDS):
        start = time.perf_counter_ns()
        times = session.time_ops(x)
        if index >= _WARM_UP_ROUNDS:
            whole.append(time.perf_counter_ns() - start)
            by_op.append([nanoseconds for _, nanoseconds in times])
    # Each op has its own median: a process that takes the core for a moment slows one op of one run.
    medians = np.median(np.array(by_op, float), axis=0)
    best, total = threads * peak(), max(float(medians.sum()), 1.0)
    rows = [_row(op, float(median), total, best) for (op, _), median in zip(times, medians, strict=True)]
    return {
        "whole_s": float(np.median(whole)) / 1e9,
        "ops_s": total / 1e9,
        "reference_s": sum(row["seconds"] for row in rows if row["on_reference"]),
        "peak_gflops": best,
        "gflops": 2 * sum(op.multiply_adds for op, _ in times) / total,
        "ops": rows,
    }


def _row(op: OpSummary, nanoseconds: float, total: float, best: float) -> LayerRow:
    # An op of a few entries may take less than the clock can tell.
    gflops = 2 * op.multiply_adds / max(nanoseconds, 1.0) if op.multiply_adds else None
    return {
        "kind": op.kind,
        "operator": op.origin.operator,
        "node": op.origin.node,
        "layer": op.origin.layer or None,
        "on_reference": op.on_reference,
        "shape": list(op.shape),
        "layout": op.layout,
        "tile": op.tile,
        "block": op.block,
        "blocks": op.blocks,
        "density": op.density,
        "with_zeros": op.with_zeros,
        "multiply_adds": op.multiply_adds,
        "seconds": nanoseconds / 1e9,
        "share": nanoseconds / total,
        "gflops": gflops,
        "peak_share": None if gflops is None else gflops / best,
    }
