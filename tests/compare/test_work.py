import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from converters.loading import load
from dsr_tool.compare.attempt import attempt
from dsr_tool.compare.cells import Comparison
from dsr_tool.compare.grid import make_grid
from dsr_tool.compare.work import Order, work, work_in_processes

SAME = ("test_accuracy", "test_loss", "best_test_accuracy", "nonzeros", "archive_bytes", "inference_macs", "steps")


def planned(tables, path, **changes):
    comparison = Comparison(path)
    grid = make_grid(tables(**changes), "grid")
    comparison.add(grid)
    return comparison, grid


def order(comparison, grid, **changes):
    names = tuple(cell.name for cell in grid.cells)
    return Order(**{"path": str(comparison.path), "names": names, "since": time.time(), **changes})


def statuses(comparison):
    return {cell.name: (comparison.record(cell.name) or {}).get("status") for cell in comparison.plan().cells}


def test_every_cell_is_trained_exported_and_measured(tables, tmp_path):
    comparison, grid = planned(tables, tmp_path / "out", methods=["dsr", "gmp", "ticket"])
    lines = []
    work(order(comparison, grid), lines.append)
    assert set(statuses(comparison).values()) == {"complete"} and len(lines) == 2 * len(grid.cells)
    dsr, gmp, dense = (comparison.record(name) for name in ("dsr@0.9-s0", "gmp@0.9-s0", "dense-s0"))
    run = comparison.run_folder("dsr@0.9-s0")
    assert dsr["archive_bytes"] == (run / "model.dsr").stat().st_size and dsr["verified"]
    assert math.isclose(dsr["sparsity"], 0.9) and math.isclose(gmp["sparsity"], 0.9) and dense["sparsity"] == 0
    assert dsr["nonzeros"] == load(run).active_weights + 1820 and dsr["inference_macs"] < dense["inference_macs"]
    assert dsr["peak_memory_bytes"] > 10**7 and dsr["train_time_s"] > 0
    assert dsr["machine"]["threads"] == 1 and dsr["machine"]["device"] == "cpu"
    assert {"log.jsonl", "config.json", "settings.json", "recipe.toml", "model.dsr"} <= {p.name for p in run.iterdir()}
    assert not (run / "best").exists() and not (run / "training.safetensors").exists()


def test_a_ticket_has_the_masks_of_the_run_of_its_seed(tables, tmp_path):
    comparison, grid = planned(tables, tmp_path / "out", methods=["ticket", "fresh"], seeds=[4], set={"lr": 1e-9})
    work(order(comparison, grid), lambda line: None)
    found, original, fresh = (load(comparison.run_folder(f"{method}@0.9-s4")) for method in ("dsr", "ticket", "fresh"))
    for name, mask in found.masks.items():
        assert torch.equal(original.masks[name], mask) and torch.equal(fresh.masks[name], mask)
        # At a learning rate of 1e-9, the weights after training are those before it.
        both = original.weights[name][mask], fresh.weights[name][mask]
        assert (both[0] - both[1]).abs().mean() > 0.1 * both[0].abs().mean()
    assert fresh.config.conversion["seed"] == 1_000_004 and original.config.conversion["seed"] == 4


def test_complete_cells_are_skipped_and_failed_ones_tried_again(tables, tmp_path):
    comparison, grid = planned(tables, tmp_path / "out", methods=["static", "afterwards"])
    work(order(comparison, grid), lambda line: None)
    assert statuses(comparison) == {
        "static@0.9-s0": "complete",
        "broken@0.9-s0": "failed",
        "afterwards@0.9-s0": "failed",
    }
    assert "no such layer" in comparison.record("broken@0.9-s0")["error"]
    assert comparison.record("afterwards@0.9-s0")["error"] == "it starts from broken@0.9-s0, which failed."
    before = comparison.record("static@0.9-s0")
    lines = []
    work(order(comparison, grid), lines.append)
    assert comparison.record("static@0.9-s0") == before
    assert [line.partition(":")[0] for line in lines] == ["broken@0.9-s0", "broken@0.9-s0", "afterwards@0.9-s0"]


def test_an_unreachable_sparsity_fails_one_cell(tables, tmp_path):
    comparison, grid = planned(tables, tmp_path / "out", methods=["static"], sparsity=[0.9, 0.999999])
    work(order(comparison, grid), lambda line: None)
    assert statuses(comparison) == {"static@0.9-s0": "complete", "static@0.999999-s0": "failed"}
    assert "cannot be reached" in comparison.record("static@0.999999-s0")["error"]


def test_the_deadline_pauses_a_cell_and_the_next_call_resumes_it(tables, tmp_path):
    comparison, grid = planned(tables, tmp_path / "out", methods=["dsr"], set={"epochs": 3})
    work(order(comparison, grid, deadline=time.monotonic() + 1e-9), lambda line: None)
    assert comparison.record("dsr@0.9-s0") is None
    attempt(grid.cells[0], comparison, grid.data, deadline=0.0)
    record = comparison.record("dsr@0.9-s0")
    assert record["status"] == "paused" and record["epochs"] == 1 and record["of_epochs"] == 3
    work(order(comparison, grid), lambda line: None)
    whole, _ = planned(tables, tmp_path / "whole", methods=["dsr"], set={"epochs": 3})
    work(order(whole, grid), lambda line: None)
    one, other = comparison.record("dsr@0.9-s0"), whole.record("dsr@0.9-s0")
    assert {key: one[key] for key in SAME} == {key: other[key] for key in SAME}


def test_a_damaged_run_fails_with_a_remedy_that_works(tables, tmp_path):
    comparison, grid = planned(tables, tmp_path / "out", methods=["static"])
    attempt(grid.cells[0], comparison, grid.data, deadline=0.0)
    run = comparison.run_folder("static@0.9-s0")
    (run / "settings.json").write_text("{")
    work(order(comparison, grid), lambda line: None)
    error = comparison.record("static@0.9-s0")["error"]
    assert f"run {str(run)!r} is damaged and cannot be resumed" in error and "delete that folder" in error
    shutil.rmtree(run)
    work(order(comparison, grid), lambda line: None)
    assert statuses(comparison) == {"static@0.9-s0": "complete"}


def test_a_cell_locked_by_another_process_is_skipped(tables, tmp_path):
    comparison, grid = planned(tables, tmp_path / "out")
    lock = comparison.try_lock("dsr@0.9-s0")
    assert comparison.try_lock("dsr@0.9-s0") is None
    lines = []
    blocked = order(comparison, grid, deadline=time.monotonic() + 1, names=("dsr@0.9-s0",))
    work(blocked, lines.append)
    assert statuses(comparison) == {"dsr@0.9-s0": None, "static@0.9-s0": None}
    assert any(line.startswith("waiting for other processes") for line in lines)
    lock.release()
    work(order(comparison, grid), lines.append)
    assert set(statuses(comparison).values()) == {"complete"}


@pytest.mark.slow
def test_several_processes_share_the_cells_and_give_the_same_results(tables, tmp_path):
    alone, grid = planned(tables, tmp_path / "alone", methods=["dsr", "gmp"], seeds=2)
    work(order(alone, grid), lambda line: None)
    shared, _ = planned(tables, tmp_path / "shared", methods=["dsr", "gmp"], seeds=2)
    work_in_processes(order(shared, grid), 2, quiet=True)
    for cell in grid.cells:
        one, other = alone.record(cell.name), shared.record(cell.name)
        assert {key: one[key] for key in SAME} == {key: other[key] for key in SAME}


@pytest.mark.slow
def test_a_killed_comparison_resumes_to_the_same_results(tables, tmp_path):
    whole, grid = planned(tables, tmp_path / "whole", methods=["dsr"], set={"epochs": 8})
    work(order(whole, grid), lambda line: None)
    cut, _ = planned(tables, tmp_path / "cut", methods=["dsr"], set={"epochs": 8})
    argument = json.dumps(order(cut, grid).__dict__)
    log = cut.run_folder("dsr@0.9-s0") / "log.jsonl"
    for epochs in (2, 4):
        command = [sys.executable, "-m", "dsr_tool.compare.work", argument, "1"]
        worker = subprocess.Popen(command, stdin=subprocess.PIPE)
        while not log.is_file() or log.read_text().count('"kind": "epoch"') < epochs:
            assert worker.poll() is None
            time.sleep(0.02)
        os.kill(worker.pid, signal.SIGKILL)
        worker.communicate()
        assert cut.record("dsr@0.9-s0") is None
    work(order(cut, grid), lambda line: None)
    one, other = cut.record("dsr@0.9-s0"), whole.record("dsr@0.9-s0")
    assert {key: one[key] for key in SAME} == {key: other[key] for key in SAME}
