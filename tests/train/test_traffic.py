"""Bytes that a training sends per step, counted by the kernel in network namespaces of their own."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(
    shutil.which("unshare") is None
    or shutil.which("ip") is None
    or subprocess.run(["unshare", "-rnm", "true"], check=False, capture_output=True).returncode != 0,
    reason="network namespaces cannot be made here",
)

WORKER = Path(__file__).with_name("worker.py")

LOOPBACK = """
ip link set lo up
for rank in 0 1; do RANK=$rank "$@" & done
wait
"""

# A switch with a cable to each of four namespaces. They vanish with the namespaces of this shell.
SWITCHED = """
set -e
mount -t tmpfs tmpfs /run
mkdir /run/netns
ip link add name switch type bridge
ip link set switch up
for rank in 0 1 2 3; do
  ip netns add rank$rank
  ip link add port$rank type veth peer name eth0 netns rank$rank
  ip link set port$rank master switch up
  ip -n rank$rank addr add 10.0.0.$((rank + 1))/24 dev eth0
  ip -n rank$rank link set eth0 up
  ip -n rank$rank link set lo up
done
for rank in 0 1 2 3; do RANK=$rank ip netns exec rank$rank "$@" & done
wait
"""


FIRST, LAST = 5, 35
"""Steps between which bytes are counted: DDP arranges its messages anew after the first."""


def start(script, folder, environment, count, address, interface, options):
    folder.mkdir()
    options = {**options, "count": {"interface": interface, "first": FIRST, "last": LAST}}
    more = {"MASTER_ADDR": address, "MASTER_PORT": "29500", "WORLD_SIZE": str(count), "GLOO_SOCKET_IFNAME": interface}
    line = ["unshare", "-rnm", "sh", "-c", script, "sh", sys.executable, WORKER, folder, json.dumps(options)]
    done = subprocess.run(line, env=environment(**more), check=False, capture_output=True, text=True, timeout=300)
    ends = [folder / f"rank{rank}.pt" for rank in range(count)]
    assert done.returncode == 0 and all(end.exists() for end in ends), done.stderr
    states = [torch.load(end, weights_only=True) for end in ends]
    sent = [int((folder / f"sent{rank}").read_text()) for rank in range(count)]
    return states, sent


def sent_values(state, storage):
    """Returns the number of values with a gradient: all weights, or active ones and the dense rest."""
    masks = {name.removeprefix("mask "): mask for name, mask in state.items() if name.startswith("mask ")}
    return sum(
        int(masks[name].sum()) if storage == "compact" and name in masks else value.numel()
        for name, value in state.items()
        if not name.startswith("mask ")
    )


COUNTED = {
    "network": "wide",
    "data": "fake:960",
    "settings": {"method": "dsr", "every": 3, "epochs": 1, "batch_size": 24},
}


@pytest.mark.parametrize("storage", ["masked", "compact"])
def test_a_step_sends_what_has_a_gradient_and_little_else(tmp_path, environment, storage):
    options = {**COUNTED, "settings": {**COUNTED["settings"], "storage": storage}}
    states, sent = start(LOOPBACK, tmp_path / "run", environment, 2, "127.0.0.1", "lo", options)
    # Both processes send through lo, and both count.
    per_step = sum(sent) / 2 / 2 / (LAST - FIRST)
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert 1.0 <= per_step / (4 * sent_values(states[0], storage)) <= 1.1


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["masked", "compact"])
def test_four_processes_in_four_network_namespaces(tmp_path, environment, launch, storage):
    settings = {**COUNTED["settings"], "storage": storage, "method": "static"}
    options = {**COUNTED, "settings": settings}
    states, sent = start(SWITCHED, tmp_path / "run", environment, 4, "10.0.0.1", "eth0", options)
    (alone,) = launch(1, "alone", **options).states
    for state in states:
        assert all(torch.equal(value, states[0][name]) for name, value in state.items())
    for name, value in alone.items():
        torch.testing.assert_close(states[0][name], value, rtol=1e-4, atol=1e-6)
    # In a ring of n processes, each sends 2 (n - 1) / n of the values.
    most = 1.5 * 4 * sent_values(states[0], storage)
    assert all(1.0 <= each / (LAST - FIRST) / most <= 1.1 for each in sent)
