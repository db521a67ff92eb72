"""In a distributed loop of one's own, all ranks have the same masks, or it ends with a sentence."""

import json
import socket

import pytest
import torch
from torch import distributed, multiprocessing, nn, optim

from converters.conversion import convert
from dsr_tool import attach
from dsr_tool.errors import DsrError


def network(seed, storage, positions):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    return convert(
        net, sparsity=0.8, input_shape=(3, 8, 8), storage=storage, positions=positions, seed=seed, keep_dense=[]
    )


CASES = {
    **{
        f"{wrap} {storage}": {"method": "dsr", "seeds": (0, 1), "wrap": wrap, "storage": storage}
        for wrap in ("first", "last")
        for storage in ("masked", "compact")
    },
    "seeds": {"method": "dsr", "attach_seeds": (0, 1)},
    "late": {"method": "static", "seeds": (0, 1), "late": True},
    "equal dsr": {"method": "dsr", "wrap": "first"},
    "equal rigl": {"method": "rigl", "wrap": "last"},
    "equal set": {"method": "set", "wrap": "last", "storage": "compact"},
    "own gradients": {"method": "rigl", "storage": "compact"},
    "alone": {"method": "dsr", "seeds": (0, 1), "alone": True},
}
"""What the two ranks do, by name: their method and seeds, when DistributedDataParallel wraps the network, and so on."""


def train_all(rank, ports, folder):
    """Runs all cases in one of two processes, and writes what happened to a file."""
    torch.set_num_threads(1)
    answers = {name: train(rank, ports[name], case) for name, case in CASES.items()}
    (folder / f"{rank}.json").write_text(json.dumps(answers), encoding="utf-8")


def train(rank, port, case):
    """Trains a few steps. Returns the weights, or the error."""
    group = {"init_method": f"tcp://127.0.0.1:{port}", "rank": rank, "world_size": 2}
    if not case.get("late"):
        distributed.init_process_group("gloo", **group)
    own = distributed.new_group([rank], use_local_synchronization=True) if case.get("alone") else None
    seed, storage = case.get("seeds", (0, 0))[rank], case.get("storage", "masked")
    model = network(seed, storage, "magnitude")
    net = model.module
    if case.get("wrap") == "first":
        net = nn.parallel.DistributedDataParallel(net)
    try:
        optimizer = optim.SGD(net.parameters(), 0.1, momentum=0.9)
        options = {} if case["method"] == "static" else {"every": 2}
        seed = case.get("attach_seeds", (0, 0))[rank]
        attached = attach(model, optimizer, case["method"], total_steps=20, seed=seed, process_group=own, **options)
        if case.get("late"):
            distributed.init_process_group("gloo", **group)
        if case.get("wrap") == "last":
            net = nn.parallel.DistributedDataParallel(net)
        torch.manual_seed(rank + 10)
        for _ in range(6):
            optimizer.zero_grad()
            net(torch.randn(8, 3, 8, 8)).square().mean().backward()
            attached.mask_gradients()
            optimizer.step()
            model.check()
        return {name: weight.tolist() for name, weight in model.weights.items()}
    except DsrError as error:
        return str(error)
    finally:
        distributed.destroy_process_group()


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Returns what the two ranks answered to each case."""
    ports = {}
    for name in CASES:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports[name] = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(train_all, (ports, folder), nprocs=2)
    one, other = (json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2))
    return {name: (one[name], other[name]) for name in CASES}


@pytest.mark.parametrize("name", ["first masked", "last masked", "first compact", "last compact", "late"])
def test_ranks_with_other_masks_are_refused(answers, name):
    for answer in answers[name]:
        assert "the mask of '0.weight' differs between the processes" in answer
        assert "torch.manual_seed with one seed" in answer


def test_ranks_with_other_seeds_are_refused(answers):
    for answer in answers["seeds"]:
        assert answer.startswith("the seed differs between the processes")


def test_gradients_that_each_rank_keeps_for_itself_are_refused(answers):
    for answer in answers["own gradients"]:
        assert answer.startswith("method rigl reads gradients of inactive weights, which compact storage keeps")


@pytest.mark.parametrize("name", ["equal dsr", "equal rigl", "equal set"])
def test_equal_ranks_stay_equal(answers, name):
    one, other = answers[name]
    assert isinstance(one, dict) and one == other


def test_ranks_that_train_networks_of_their_own_say_so(answers):
    one, other = answers["alone"]
    assert isinstance(one, dict) and isinstance(other, dict) and one != other
