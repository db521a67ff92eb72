import csv
import io
import json
import math
import statistics

import pytest

from dsr_tool.compare.cells import Comparison
from dsr_tool.compare.grid import make_grid
from dsr_tool.compare.outputs import write_outputs
from dsr_tool.compare.results import rows

LAYERS = ("fc1.weight", "fc2.weight")


def record(accuracy, **changes):
    return {
        "status": "complete",
        "test_accuracy": accuracy,
        "best_test_accuracy": accuracy + 0.01,
        "sparsity": 0.9,
        "model_sparsity": 0.89,
        "nonzeros": 27440,
        "parameters": 267020,
        "inference_macs": 26600,
        "archive_bytes": 112_000,
        "train_time_s": 3.5,
        "peak_memory_bytes": 10**9,
        "machine": {"device": "cpu", "name": "x86_64", "threads": 1, "versions": {"torch": "2.15.0"}},
        **changes,
    }


def log(path, epochs, accuracy):
    """A log as a run leaves it, whose density moves from the first layer to the second."""
    start = {"kind": "start", "settings": {"method": "dsr"}, "data": "fake", "prunable_weights": 1000}
    lines = [start]
    for i in range(1, epochs + 1):
        lines.append(
            {
                "kind": "epoch",
                "epoch": i,
                "step": 3 * i,
                "train_loss": 1.0,
                "test_loss": 1.0,
                "train_accuracy": accuracy,
                "test_accuracy": accuracy * i / epochs,
                "lr": 0.1,
                "time_s": 1.0,
                "density": {LAYERS[0]: 0.1 - 0.005 * i, LAYERS[1]: 0.1 + 0.01 * i},
                "dropped": dict.fromkeys(LAYERS, 1),
                "grown": dict.fromkeys(LAYERS, 1),
                "threshold": 0.001,
                "explored": {LAYERS[0]: 50 + 20 * i, LAYERS[1]: 50 + 10 * i},
            }
        )
    path.mkdir(parents=True)
    (path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def comparison(tables, tmp_path):
    """Complete, failed, paused and missing cells."""
    comparison = Comparison(tmp_path / "out")
    comparison.add(make_grid(tables(methods=["dsr", "static", "dense"], sparsity=[0.9, 0.95], seeds=3), "grid"))
    for seed, accuracy in enumerate((0.91, 0.93, 0.98)):
        comparison.write_record(f"dsr@0.9-s{seed}", record(accuracy))
        log(comparison.run_folder(f"dsr@0.9-s{seed}"), 4 + seed, accuracy)
    comparison.write_record("dsr@0.95-s0", record(0.9, archive_bytes=60_000, inference_macs=13_000))
    log(comparison.run_folder("dsr@0.95-s0"), 4, 0.9)
    comparison.write_record(
        "static@0.9-s0", {"status": "failed", "cell": "static@0.9-s0", "error": "it broke <b>.", "at": 0}
    )
    comparison.write_record("static@0.9-s1", {"status": "paused", "epochs": 1, "of_epochs": 2})
    return comparison


def test_rows_are_means_and_sample_standard_deviations(comparison):
    found = {(row.method, row.sparsity): row for row in rows(comparison, comparison.plan())}
    dsr = found["dsr", 0.9]
    assert dsr.mean("test_accuracy") == statistics.fmean([0.91, 0.93, 0.98])
    assert dsr.sd("test_accuracy") == statistics.stdev([0.91, 0.93, 0.98]) and dsr.state == ""
    assert found["dsr", 0.95].sd("test_accuracy") is None and found["dsr", 0.95].state == "2 not run"
    assert found["static", 0.9].state == "1 failed, 1 paused, 1 not run"
    assert found["static", 0.95].state == "not run" and found["static", 0.95].mean("nonzeros") is None
    assert list(found)[:2] == [("dsr", 0.95), ("dsr", 0.9)] and ("dense", None) in found


def test_published_results_are_shown_only_for_the_same_data(comparison, tables, tmp_path):
    assert all(row.published == {} for row in rows(comparison, comparison.plan()))
    other = Comparison(tmp_path / "digits")
    other.add(make_grid(tables(data="digits"), "grid"))
    assert rows(other, other.plan())[0].published == {"accuracy": 0.975, "sd": 0.005, "n": 3}


def test_the_outputs_agree_with_each_other(comparison):
    document, text = write_outputs(comparison, comparison.plan())
    assert document["schema"] == "dsr-tool/compare/1"
    assert document["counts"] == {"complete": 4, "failed": 1, "paused": 1, "not run": 9}
    assert json.loads((comparison.path / "table.json").read_text()) == document
    assert (comparison.path / "table.txt").read_text() == text + "\n"
    assert "small, data fake:300 in place of digits\n" in text
    line = next(line for line in text.splitlines() if line.startswith("dsr") and " 0.9 " in line)
    assert line.split()[2:5] == ["94.00", "3.61", "3"] and "112.0" in line
    assert "failed: static@0.9-s0: it broke <b>." in text and "1 failed, 1 paused, 1 not run" in text
    table = list(csv.DictReader(io.StringIO((comparison.path / "table.csv").read_text())))
    first = next(row for row in table if row["method"] == "dsr" and row["asked_sparsity"] == "0.9")
    assert math.isclose(float(first["test_accuracy"]), 0.94) and float(first["archive_bytes"]) == 112_000
    assert table[-1]["method"] == "dense" and table[-1]["state"] == "not run" and table[-1]["test_accuracy"] == ""


def test_the_page_shows_every_curve_and_what_failed(comparison):
    write_outputs(comparison, comparison.plan())
    page = (comparison.path / "page.html").read_text()
    for part in (
        "4 of 15",
        "Accuracy against bytes of the archive",
        "Accuracy against multiply-adds",
        "Accuracy by epoch at sparsity 0.9",
        "Share of weights ever active by epoch at sparsity 0.95",
        "dsr: density by layer and epoch",
        "static@0.9-s0 failed: it broke &lt;b&gt;.",
        "not run",
        "dsr at 0.9: 94.00",
        "Machine of 4 runs",
    ):
        assert part in page, part
    assert "<b>." not in page


def test_a_page_without_complete_runs_is_valid(tables, tmp_path):
    empty = Comparison(tmp_path / "out")
    empty.add(make_grid(tables(), "grid"))
    write_outputs(empty, empty.plan())
    page = (empty.path / "page.html").read_text()
    assert "0 of 2" in page and "Accuracy against" not in page


def test_writing_again_gives_the_same_bytes(comparison):
    write_outputs(comparison, comparison.plan())
    before = {path.name: path.read_bytes() for path in comparison.path.iterdir() if path.is_file()}
    write_outputs(comparison, comparison.plan())
    assert before == {path.name: path.read_bytes() for path in comparison.path.iterdir() if path.is_file()}
