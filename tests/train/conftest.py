import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from converters.conversion import convert
from dsr_tool.train import TrainSettings, load_data


class Tiny(nn.Module):
    """Two convolutions, normalisation and a classifier: enough for weights to move between layers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        return self.head(torch.relu(self.second(x)).amax((2, 3)))


@pytest.fixture(autouse=True, scope="package")
def _one_thread():
    """Uses one thread: networks this small are slower on several, and much slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny():
    """Returns makers of the small network, a sparse model of it, its data, and settings that reallocate often."""

    def model(sparsity=0.8, seed=0, **more):
        torch.manual_seed(seed)
        return convert(Tiny(), sparsity=sparsity, input_shape=(3, 8, 8), positions="random", seed=seed, **more)

    def settings(**changes):
        return TrainSettings(**{"epochs": 2, "batch_size": 64, "every": 5, "device": "cpu", **changes})

    def data(spec="fake:200"):
        return load_data(spec, model().config)

    return SimpleNamespace(module=Tiny, model=model, settings=settings, data=data)


@pytest.fixture
def arrays():
    """Returns a function that writes a .npz file of labelled images, with some arrays replaced."""

    def write(path, **changes):
        rng = np.random.default_rng(0)
        content = {
            "x_train": rng.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8),
            "y_train": np.arange(20) % 4,
            "x_test": rng.integers(0, 256, (8, 8, 8, 3), dtype=np.uint8),
            "y_test": np.arange(8) % 4,
            **changes,
        }
        np.savez(path, **{name: value for name, value in content.items() if value is not None})
        return path

    return write


def _environment(**more):
    root = str(Path(__file__).parents[2])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root, **more}


@pytest.fixture
def environment():
    """Returns a function that gives a process of a test its environment: one thread, and the code under test."""
    return _environment


@pytest.fixture
def launch(tmp_path):
    """Returns a function that starts `worker.py` as several processes, without torchrun's start-up time.

    It returns an object with codes and messages of the processes, the epochs in the log, and the states that were left.
    """

    def start(count, folder="", *, wanted=None, **options):
        folder = tmp_path / (folder or "run")
        folder.mkdir(exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(count)}
        command = [sys.executable, Path(__file__).with_name("worker.py"), folder, json.dumps(options)]
        processes = [
            subprocess.Popen(command, env=_environment(RANK=str(rank), **meeting), stderr=subprocess.PIPE, text=True)
            for rank in range(count)
        ]
        errors = [process.communicate(timeout=300)[1] for process in processes]
        codes = [process.returncode for process in processes]
        assert codes == (wanted or [0] * count), errors
        log = folder / "run" / "log.jsonl"
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        ends = [folder / f"rank{rank}.pt" for rank in range(count)]
        states = [torch.load(end, weights_only=True) for end in ends if end.exists()]
        epochs = [line for line in lines if line["kind"] == "epoch"]
        return SimpleNamespace(folder=folder, errors=errors, epochs=epochs, states=states)

    return start
