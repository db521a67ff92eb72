"""Several processes that train one model reach the same result as one process."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from converters.conversion import convert
from dsr_tool.errors import CheckFailed, UsageError
from dsr_tool.train import Ranks, TrainSettings
from dsr_tool.train.checksums import checksums


@pytest.fixture
def torchrun(environment):
    def start(*command):
        line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
        line += map(str, command)
        return subprocess.run(line, env=environment(), check=False, capture_output=True, text=True)

    return start


def equal(states, expected):
    return all(torch.equal(value, state[name]) for state in states for name, value in expected.items())


def test_two_processes_train_as_one_does(launch):
    settings = {"method": "dsr", "every": 2}
    alone = launch(1, "one", settings=settings)
    shared = launch(2, "two", settings=settings)
    assert equal(shared.states, shared.states[0]) and shared.states[0].keys() == alone.states[0].keys()
    for name in ("active_weights", "step"):
        assert [epoch[name] for epoch in shared.epochs] == [epoch[name] for epoch in alone.epochs]
    # Sums of gradients round differently, which a reallocation may turn into another weight.
    assert shared.epochs[0]["train_loss"] == pytest.approx(alone.epochs[0]["train_loss"], rel=1e-3)
    for name in ("train_loss", "test_loss"):
        assert [epoch[name] for epoch in shared.epochs] == pytest.approx([e[name] for e in alone.epochs], rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("network", ["plain", "branches"])
@pytest.mark.parametrize("storage", ["masked", "compact"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_weights_of_processes_are_those_of_one_on_the_whole_batch(launch, network, storage, accumulate):
    options = {"network": network, "frozen": network == "plain"}
    settings = {"method": "static", "storage": storage, "epochs": 2}
    (alone,) = launch(1, "one", settings=settings, **options).states
    shared = launch(2, "two", settings={**settings, "accumulate": accumulate}, **options)
    assert equal(shared.states, shared.states[0])
    assert not any("Warning" in error for error in shared.errors), shared.errors
    for name, value in alone.items():
        torch.testing.assert_close(shared.states[0][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_compiled_networks_train_as_others_do(launch):
    settings = {"method": "static", "epochs": 1, "storage": "masked"}
    plain = launch(2, "plain", settings=settings)
    compiled = launch(2, "compiled", settings={**settings, "compile": True, "accumulate": 2})
    assert equal(compiled.states, compiled.states[0])
    for name, value in plain.states[0].items():
        torch.testing.assert_close(compiled.states[0][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["static", "set", "rigl", "deepr", "snfs", "granet"])
def test_a_run_of_two_processes_resumes_in_pieces(launch, method):
    more = {"options": {"final_sparsity": 0.95}} if method == "granet" else {}
    options = {"settings": {"method": method, "every": 2, **more}, "network": "norm"}
    whole = launch(2, "whole", **options)
    for _ in range(3):
        pieces = launch(2, "pieces", resume=True, pause=True, **options)
    assert [epoch["epoch"] for epoch in pieces.epochs] == [1, 2, 3]
    assert equal((whole.states[1], *pieces.states), whole.states[0])
    assert [epoch["test_loss"] for epoch in pieces.epochs] == [epoch["test_loss"] for epoch in whole.epochs]


def test_processes_that_start_with_different_weights_are_refused(launch):
    refused = launch(2, differing=True, wanted=[CheckFailed.exit_code] * 2)
    assert all("weights or masks differ between the processes" in error for error in refused.errors)


@pytest.mark.slow
def test_the_command_runs_under_torchrun(tmp_path, torchrun):
    convert("shufflenet_v2_x0_5", num_classes=10, input_size=32, sparsity=0.8).save(tmp_path / "model")
    program = Path(sys.executable).with_name("dsr-tool")
    options = ["--data", "fake:80", "--epochs", 2, "--batch-size", 40, "--every", 1, "--device", "cpu", "--json"]
    done = torchrun(program, "train", tmp_path / "model", "-o", tmp_path / "run", *options, "--accumulate", 2)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["finished"] and document["steps"] == 4 and document["settings"]["accumulate"] == 2
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


def test_checksums_see_every_bit_and_the_order():
    torch.manual_seed(0)
    values = torch.randn(300_001)
    same = values.clone().as_strided((300_001,), (1,))
    assert torch.equal(*checksums([values, same]))
    for index in (0, 131_072, 300_000):
        for bit in (0, 31):
            other = values.clone()
            other.view(torch.int32)[index] ^= torch.tensor(1 << bit).to(torch.int32)
            assert not torch.equal(*checksums([values, other]))
    assert not torch.equal(*checksums([values, values.flip(0)]))
    chunks = values[: 2**20].roll(2**18)  # words change places, in whole chunks and within
    assert not torch.equal(*checksums([values, chunks]))


def test_checksums_do_not_depend_on_memory():
    weight = torch.randn(6, 4, 3, 3)
    mask = weight > 0
    sums = checksums([weight, mask, torch.tensor(True), torch.zeros(0), weight[1:2]])
    last = [weight.to(memory_format=torch.channels_last), mask.contiguous(memory_format=torch.channels_last)]
    assert torch.equal(checksums(last), sums[:2])
    assert torch.equal(checksums([weight[1:2].clone()]), sums[4:]) and len(checksums([])) == 0


def test_help_says_that_the_batch_is_that_of_a_step(run):
    code, out, _ = run("train", "--help")
    assert code == 0 and TrainSettings.accumulate == 1
    assert "--batch-size images still make one step" in re.sub(r"\s+", " ", out)
