"""Two processes that train one model reach the same result as one process."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from converters.conversion import convert
from dsr_tool.errors import UsageError
from dsr_tool.train import Ranks

# A model without batch normalisation, whose batches may be shared out without a trace.
SCRIPT = """
import json
import sys
import torch
from torch import nn
from converters.conversion import convert
from converters.loading import load
from dsr_tool.train import Follower, RunFolder, TrainSettings, joined, load_data, train

torch.set_num_threads(1)
folder, method, resume = sys.argv[1], sys.argv[2], sys.argv[3] == "resume"

def make():
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))

with joined(torch.device("cpu")) as ranks:
    run = RunFolder(folder + "/run", resume=resume) if ranks.first else Follower(folder + "/run", resume)
    torch.manual_seed(0)
    model = load(folder + "/run", make()) if run.stopped else convert(
        make(), sparsity=0.8, input_shape=(3, 8, 8), positions="random", seed=0)
    data = load_data("fake:200", model.config)
    settings = TrainSettings(method=method, epochs=3, batch_size=48, every=3, augment="crop-flip", device="cpu")
    run.facts = {"settings": settings.to_dict()}
    ranks.wait()
    with run:
        train(model, data, settings, [run], state=run.stopped.state if run.stopped else None,
              deadline=0.0 if resume else float("inf"))
    torch.save({**model.module.state_dict(), **{"mask " + k: v for k, v in model.masks.items()}},
               f"{folder}/rank{ranks.rank}.pt")
"""


def environment(**more):
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2]), **more}


def torchrun(*command):
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    line += map(str, command)
    return subprocess.run(line, env=environment(), check=False, capture_output=True, text=True)


def launch(count, *command):
    """Starts processes with the environment that torchrun sets, without its start-up time."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(count)}
    processes = [
        subprocess.Popen([sys.executable, *map(str, command)], env=environment(RANK=str(rank), **meeting))
        for rank in range(count)
    ]
    assert [process.wait() for process in processes] == [0] * count


def train_by(folder, method, *, processes, pieces=1):
    folder.mkdir()
    (folder / "script.py").write_text(SCRIPT)
    for _ in range(pieces):
        launch(processes, folder / "script.py", folder, method, "resume" if pieces > 1 else "")
    lines = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    states = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(processes)]
    return [line for line in lines if line["kind"] == "epoch"], states


def test_two_processes_train_as_one_does(tmp_path):
    alone, _ = train_by(tmp_path / "one", "dsr", processes=1)
    shared, (first, second) = train_by(tmp_path / "two", "dsr", processes=2)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    for name in ("active_weights", "step"):
        assert [epoch[name] for epoch in shared] == [epoch[name] for epoch in alone]
    # Sums of gradients round differently, which a reallocation may turn into another weight.
    assert shared[0]["train_loss"] == pytest.approx(alone[0]["train_loss"], rel=1e-3)
    for name in ("train_loss", "test_loss"):
        assert [epoch[name] for epoch in shared] == pytest.approx([epoch[name] for epoch in alone], rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["static", "set", "rigl", "deepr"])
def test_a_run_of_two_processes_resumes_in_pieces(tmp_path, method):
    whole, ends = train_by(tmp_path / "whole", method, processes=2)
    pieces, resumed = train_by(tmp_path / "pieces", method, processes=2, pieces=3)
    assert [epoch["epoch"] for epoch in pieces] == [1, 2, 3]
    for state in (ends[1], *resumed):
        assert all(torch.equal(value, state[name]) for name, value in ends[0].items())
    assert [epoch["test_loss"] for epoch in pieces] == [epoch["test_loss"] for epoch in whole]


@pytest.mark.slow
def test_the_command_runs_under_torchrun(tmp_path):
    convert("shufflenet_v2_x0_5", num_classes=10, input_size=32, sparsity=0.8).save(tmp_path / "model")
    program = Path(sys.executable).with_name("dsr-tool")
    options = ["--data", "fake:80", "--epochs", 2, "--batch-size", 40, "--every", 1, "--device", "cpu", "--json"]
    done = torchrun(program, "train", tmp_path / "model", "-o", tmp_path / "run", *options)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["finished"] and document["steps"] == 4
    odd = torchrun(program, "train", tmp_path / "model", "-o", tmp_path / "odd", *options, "--batch-size", 39)
    assert odd.returncode != 0 and "cannot be divided among 2 processes" in odd.stderr
    assert not (tmp_path / "odd").exists()


def test_every_rank_takes_its_part_of_each_batch():
    order = torch.randperm(24)
    parts = [Ranks(rank, 3).share(order, 6) for rank in range(3)]
    assert [size for _, size in parts] == [2, 2, 2]
    for batch in range(4):
        together = torch.cat([part[2 * batch : 2 * batch + 2] for part, _ in parts])
        assert torch.equal(together, order[6 * batch : 6 * batch + 6])
    assert Ranks().share(order, 6) == (order, 6)


@pytest.mark.parametrize(("batch", "count"), [(5, 2), (2, 2), (100, 5)])
def test_batches_that_cannot_be_divided_are_refused(batch, count):
    with pytest.raises(UsageError, match=f"cannot be divided among {count} processes"):
        Ranks(0, count).share(torch.arange(24), batch)
