"""The log of methods that report more than a threshold, or update at every step."""

import json

import pytest
import torch

from converters.conversion import convert
from dsr_tool.errors import UsageError
from dsr_tool.train import RunFolder, train


def lines(folder, kind):
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in log if line["kind"] == kind]


def test_a_method_that_updates_at_every_step_is_logged_by_epoch(tiny, tmp_path):
    with RunFolder(tmp_path / "run") as folder:
        train(tiny.model(), tiny.data(), tiny.settings(method="deepr", every=None), [folder])
    epochs = lines(tmp_path / "run", "epoch")
    assert not lines(tmp_path / "run", "reallocation") and len(epochs) == 2
    assert all(line["facts"]["temperature"] > 0 and line["threshold"] is None for line in epochs)
    assert all(sum(line["dropped"].values()) == sum(line["grown"].values()) > 0 for line in epochs)


def test_kernels_are_logged_in_weights(tiny, tmp_path):
    torch.manual_seed(0)
    model = convert(tiny.module(), sparsity=0.8, input_shape=(3, 8, 8), positions="random", granularity="kernel")
    settings = tiny.settings(every=1, options={"threshold": 0.05, "target": 0.3})
    with RunFolder(tmp_path / "run") as folder:
        train(model, tiny.data(), settings, [folder])
    moved = lines(tmp_path / "run", "reallocation")
    layers = [line[what] for line in moved for what in ("dropped", "grown")]
    counts = [count for layer in layers for name, count in layer.items() if not name.startswith("head")]
    assert sum(counts) > 0 and not any(count % 9 for count in counts)
    first = lines(tmp_path / "run", "epoch")[0]
    assert first["facts"]["threshold"] == first["threshold"] > 0 and 0 < first["facts"]["share"] < 1


def test_a_method_without_kernel_granularity_creates_no_run(tiny, tmp_path):
    model = convert(tiny.module(), sparsity=0.8, input_shape=(3, 8, 8), granularity="kernel")
    with (
        pytest.raises(UsageError, match="method rigl does not keep the pattern"),
        RunFolder(tmp_path / "run") as folder,
    ):
        train(model, tiny.data(), tiny.settings(method="rigl"), [folder])
    assert not (tmp_path / "run").exists()
