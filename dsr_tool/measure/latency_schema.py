"""The keys of the bench document, as `dsr-tool bench --json` prints them."""

from __future__ import annotations

from typing import TypedDict

from dsr_tool.measure.pairs import Spread
from dsr_tool.runtime.coverage import CoverageDocument

__all__ = ["BenchDocument", "Latency", "Outputs"]


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
