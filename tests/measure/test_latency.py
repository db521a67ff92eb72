"""The measurement of a file against its dense model: pairs of runs, claims, and settings that are refused."""

import os

import numpy as np
import pytest

from dsr_tool.errors import DsrError
from dsr_tool.measure import latency as bench
from dsr_tool.measure.latency import Settings, bench_document
from dsr_tool.measure.latency_text import bench_text
from dsr_tool.measure.pairs import paired, spread, verdict
from dsr_tool.runtime.deploy.format import MAGIC


@pytest.fixture
def timed(monkeypatch):
    """Replaces the clock by one that functions advance as they run."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def taking(seconds, log=None):
        def run():
            now[0] += seconds
            if log is not None:
                log.append(seconds)

        return run

    return taking


def test_pairs_take_turns_and_the_first_run_of_each_is_not_timed(timed):
    log = []
    pairs = paired(timed(2.0, log), timed(3.0, log), 4)
    assert pairs == [(2.0, 3.0)] * 4
    assert log[:8] == [3, 3, 2, 2, 2, 2, 3, 3]


def test_the_spread_is_the_median_and_the_quartiles():
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == {"median": 3.0, "low": 2.0, "high": 4.0}


def document(low, median, high, **changes):
    seconds = {"median": 0.001, "low": 0.0005, "high": 0.002}
    ratio = {"median": median, "low": low, "high": high}
    return {
        "architecture": "net",
        "input_shape": [3, 8, 8],
        "batch": 2,
        "threads": 1,
        "rounds": 4,
        "runtime": "sparse",
        "runs_on": "native",
        "kernels": "avx2",
        "fallback": {"nodes": 124, "on_reference": 2, "operators": ["Tile", "GridSample"]},
        "latency": {"ours_s": seconds, "dense_s": seconds, "ratio": ratio, "verdict": verdict(ratio)},
        "outputs": {"largest_difference": 1e-7, "scale": 2.0},
        "load_s": {"ours": 0.1, "dense": 0.2},
        "loaded_bytes": {"ours": 1_000_000, "dense": 2_000_000},
        "peak_bytes": {"ours": 3_000_000, "dense": 4_000_000},
        "layers": None,
        **changes,
    }


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        ((1.5, 2.0, 2.5), "2.00 (quartiles 1.50-2.50): sparse is 2.00 times as fast as dense"),
        ((0.4, 0.5, 0.6), "dense is faster, by 2.00 times"),
        ((0.9, 1.1, 1.3), "the spread includes 1, so neither is faster"),
    ],
)
def test_no_gain_is_claimed_that_was_not_measured(ratio, words):
    text = bench_text(document(*ratio))
    assert words in text
    assert "sparse (avx2)" in text
    assert "outputs differ by 1e-07" in text


def test_nodes_that_no_kernel_computes_are_named():
    assert "2 of 124 nodes run on the reference: Tile, GridSample" in bench_text(document(1, 1, 1))
    all_on_kernels = {"nodes": 124, "on_reference": 0, "operators": []}
    assert "all 124 nodes run on compiled kernels" in bench_text(document(1, 1, 1, fallback=all_on_kernels))
    assert "nodes" not in bench_text(document(1, 1, 1, fallback=None))


def test_figures_that_were_not_measured_are_named():
    empty = {"load_s": None, "loaded_bytes": None, "peak_bytes": None}
    text = bench_text(document(1, 1, 1, **empty, outputs={"largest_difference": None, "scale": None}))
    assert "start and memory were not measured" in text
    assert "NaN or infinity" in text


def test_outputs_that_are_not_finite_are_not_compared():
    assert bench._compare({"y": np.array([np.nan])}, {"y": np.array([1.0])})["scale"] is None
    found = bench._compare({"y": np.array([1.0, 2.5])}, {"y": np.array([1.0, 2.0])})
    assert found == {"largest_difference": 0.5, "scale": 2.0}


def test_of_several_outputs_the_one_that_differs_most_for_its_scale_is_told():
    expected = {"large": np.array([1e6]), "small": np.array([1e-3]), "mask": np.array([True]), "none": np.zeros(0)}
    result = {**expected, "large": np.array([1e6 + 1]), "small": np.array([2e-3])}
    assert bench._compare(result, expected) == {"largest_difference": 1e-3, "scale": 1e-3}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(batch=0), "--batch 0 is not in 1 to 1,024; give the number of inputs at once"),
        (Settings(threads=0), f"--threads 0 is not in 1 to {os.cpu_count()}; give the number of threads"),
        (Settings(threads=10**4), "--threads 10000 is not in 1 to"),
        (Settings(rounds=1), "--rounds 1 is not in 4 to 10,000; give the number of rounds"),
        (Settings(runtime="spares"), "did you mean sparse"),
    ],
)
def test_settings_that_are_not_allowed_are_refused(tmp_path, settings, message):
    with pytest.raises(bench.UsageError, match=message):
        bench_document(tmp_path / "none.dsr", settings)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "FILE .*none"),
        (MAGIC, "is a plan file, which holds a program .* has its graph: archive"),
    ],
)
def test_a_file_that_cannot_be_measured_is_refused_before_a_stage_begins(tmp_path, content, message):
    path, said = tmp_path / "none.dsr", []
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DsrError, match=message):
        bench_document(path, Settings(), said.append)
    assert said == []


def test_a_model_that_onnxruntime_runs_is_named():
    text = bench_text(document(0.98, 1.0, 1.02, runs_on="onnxruntime", kernels=None))
    assert "too dense for sparse kernels, so onnxruntime ran both" in text
    assert "so onnxruntime ran both" not in bench_text(document(0.98, 1.0, 1.02))
