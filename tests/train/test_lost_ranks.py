"""A process that is killed ends the others with a sentence, and the run goes on from its last complete epoch."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from converters.conversion import convert
from converters.loading import load

LOST = "dsr-tool: another process of this run has ended; see its own message for the reason, and give --resume to go on"
TOLD = "dsr-tool: this process was told to end (SIGTERM), as torchrun does when another process of the run has ended"

# With 200 images and 24 per step, an epoch has 8 steps.
FAST = [(1, "backward", 13)]
SLOW = [
    (rank, moment, step)
    for rank in (0, 1)
    for moment, step in [("forward", 1), ("backward", 1), ("forward", 12), ("step", 13), ("evaluation", 16)]
]
SLOW += [(0, "saving", 8), (0, "saving", 16), (0, "backward", 13), (0, "step", 24)]


def options(**more):
    return {"settings": {"method": "dsr", "every": 2, "storage": "compact"}, "network": "dropout", **more}


@pytest.fixture(scope="module")
def uninterrupted():
    """Returns a place for what a run without interruption ends with."""
    return {}


def killed_and_resumed(launch, uninterrupted, rank, moment, step):
    if not uninterrupted:
        uninterrupted.update(launch(2, "whole", **options()).states[0])
    die = {"rank": rank, "moment": moment, "step": step}
    wanted = [-signal.SIGKILL if other == rank else 1 for other in range(2)]
    killed = launch(2, die=die, wanted=wanted, **options())
    assert killed.errors[1 - rank].startswith(LOST) and killed.errors[1 - rank].count("\n") == 1
    assert len(killed.epochs) >= (step - 1) // 8 and not killed.states
    resumed = launch(2, resume=True, **options())
    assert [epoch["epoch"] for epoch in resumed.epochs] == [1, 2, 3]
    for state in resumed.states:
        assert all(torch.equal(value, state[name]) for name, value in uninterrupted.items())


@pytest.mark.parametrize(("rank", "moment", "step"), FAST)
def test_a_killed_rank_ends_the_other_and_the_run_resumes_bit_for_bit(launch, uninterrupted, rank, moment, step):
    killed_and_resumed(launch, uninterrupted, rank, moment, step)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "moment", "step"), SLOW)
def test_a_rank_may_be_killed_at_any_moment(launch, uninterrupted, rank, moment, step):
    killed_and_resumed(launch, uninterrupted, rank, moment, step)


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["masked", "compact"])
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3)])
def test_a_run_resumes_with_another_number_of_processes(launch, before, after, storage):
    given = {"settings": {"method": "static", "storage": storage}}
    whole = launch(before, "whole", **given).states[0]
    launch(before, pause=True, **given)
    resumed = launch(after, resume=True, **given)
    assert [epoch["epoch"] for epoch in resumed.epochs] == [1, 2, 3] and len(resumed.states) == after
    for state in resumed.states:
        for name, value in whole.items():
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-6)


def rank_of(pid):
    """Returns the rank of a process, from the environment that torchrun gave it; None if it has none or has ended."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((int(each[5:]) for each in variables if each.startswith(b"RANK=")), None)


def child(parent, rank):
    """Waits for the process of a rank, and returns its number."""
    for _ in range(600):
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            for pid in children.read_text().split():
                if rank_of(pid) == rank:
                    return int(pid)
        time.sleep(0.05)
    raise AssertionError("the process did not start")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in /proc")
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("moment", ["imports", "training"])
def test_under_torchrun_the_other_rank_ends_with_a_sentence(tmp_path, environment, rank, moment):
    convert("shufflenet_v2_x0_5", num_classes=10, input_size=32, sparsity=0.8).save(tmp_path / "model")
    program, run = Path(sys.executable).with_name("dsr-tool"), tmp_path / "run"
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    line += [program, "train", tmp_path / "model", "-o", run, "--data", "fake:80", "--batch-size", "40", "-q"]
    line += ["--device", "cpu", "--epochs", "500"]
    started = subprocess.Popen(line, env=environment(), stderr=subprocess.PIPE, text=True)
    victim = child(started.pid, rank)
    if moment == "imports":
        time.sleep(0.5)  # past those of Python itself
    else:
        while not (run / "log.jsonl").is_file() or '"kind": "epoch"' not in (run / "log.jsonl").read_text():
            time.sleep(0.05)
    os.kill(victim, signal.SIGKILL)
    errors = started.communicate(timeout=120)[1]
    assert started.returncode != 0
    sentences = [each for each in errors.splitlines() if each.startswith("dsr-tool: ")]
    assert len(sentences) == 1 and sentences[0].startswith((LOST, TOLD)), errors
    if moment == "training":
        load(run)
        assert json.loads((run / "settings.json").read_text())["settings"]["epochs"] == 500
