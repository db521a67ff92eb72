"""The keys of the bench document, as `dsr-tool bench --json` prints them."""

from __future__ import annotations

from typing import TypedDict

from dsr_tool.measure.pairs import Spread
from dsr_tool.runtime.coverage import CoverageDocument

__all__ = ["BenchDocument", "Latency", "LayerRow", "Layers", "Outputs"]


class Latency(TypedDict):
    """Seconds per run of both sides, and dense time / our time; `verdict` is `faster`, `slower` or `even`."""

    ours_s: Spread
    dense_s: Spread
    ratio: Spread
    verdict: str


class Outputs(TypedDict):
    """The largest difference of outputs and the largest output; None if some are not finite.

    Of several outputs, both are of the one whose difference is the largest part of its scale.
    """

    largest_difference: float | None
    scale: float | None


class LayerRow(TypedDict):
    """One op of a plan, or one node on the reference.

    Attributes:
        kind: kind of the op as in `ops.def`; `reference` for a node that no kernel computes.
        operator: ONNX operator of the node that it was made for.
        node: name of the node's first output.
        layer: module whose weights it reads; None if it reads none.
        on_reference: True if no kernel computes it.
        shape: shape of the result, without the batch.
        layout: layout of the result in words.
        tile: output vectors that are held in registers; 0 for kinds without tiles.
        block: input channels that are kept in the cache together; 0 for kinds without blocks.
        blocks: number of blocks.
        density: density of its weight; None if it has none.
        with_zeros: True if inactive weights are multiplied too.
        multiply_adds: multiply-adds of active weights with pixels that exist, for the whole batch.
        seconds: median time over the runs, for the whole batch.
        share: share of the time of all ops.
        gflops: two operations per multiply-add, per nanosecond; None if it has no weights.
        peak_share: the same as a share of the peak; None if it has no weights.
    """

    kind: str
    operator: str
    node: str
    layer: str | None
    on_reference: bool
    shape: list[int]
    layout: str
    tile: int
    block: int
    blocks: int
    density: float | None
    with_zeros: bool
    multiply_adds: int
    seconds: float
    share: float
    gflops: float | None
    peak_share: float | None


class Layers(TypedDict):
    """The time of each op on the kernels.

    Attributes:
        whole_s: median seconds of a run.
        ops_s: sum of the median seconds of all ops.
        reference_s: those of nodes on the reference.
        peak_gflops: operations per nanosecond of multiply-adds that stay in registers, times the threads; measured.
        gflops: operations per nanosecond with active weights, over all ops.
        ops: the ops, in the order in which they run.
    """

    whole_s: float
    ops_s: float
    reference_s: float
    peak_gflops: float
    gflops: float
    ops: list[LayerRow]


class BenchDocument(TypedDict):
    """The result of `dsr-tool bench`, schema `dsr-tool/bench/1`.

    Attributes:
        schema: name and version of these keys.
        file: path as it was given.
        architecture: name of the model.
        input_shape: shape of one input.
        batch: inputs at once.
        threads: number of worker threads of each side.
        rounds: number of pairs of timed runs.
        runtime: our side, `sparse` or `scipy`.
        runs_on: runtime that the session chose: `native`, `scipy` or `onnxruntime`.
        kernels: instruction set of the kernels; None if another runtime ran.
        fallback: number of nodes that no kernel computes; None if no kernels ran.
        latency: seconds per run of both sides.
        outputs: difference between the outputs of both sides.
        load_s: seconds from the path to a model that is ready, by side, `ours` and `dense`; this and the figures below
            are medians of child processes, and None where no memory can be measured.
        loaded_bytes: resident memory after running, by side.
        peak_bytes: peak of resident memory while running, by side.
        layers: time of each op on the kernels; None unless it was asked for.
    """

    schema: str
    file: str
    architecture: str
    input_shape: list[int]
    batch: int
    threads: int
    rounds: int
    runtime: str
    runs_on: str
    kernels: str | None
    fallback: CoverageDocument | None
    latency: Latency
    outputs: Outputs
    load_s: dict[str, float] | None
    loaded_bytes: dict[str, int] | None
    peak_bytes: dict[str, int] | None
    layers: Layers | None
