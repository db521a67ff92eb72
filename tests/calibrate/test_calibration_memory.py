"""The memory of a calibration is estimated before it starts, and the limit of a control group counts."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dsr_tool.calibrate import memory
from dsr_tool.calibrate.memory import Need, available_bytes, memory_need, require_memory
from dsr_tool.calibrate.views import affordable_views
from dsr_tool.calibrate.wide import moment_bytes
from dsr_tool.errors import UsageError
from dsr_tool.measure.memory.process import ENVIRONMENT, can_measure
from dsr_tool.sparse.discover import discover

SHAPE = (3, 16, 16)

SOLVED = """
import sys, torch
from dsr_tool.calibrate.solver import Problem, solve
from dsr_tool.measure.memory.process import held_bytes, reset_peak
def problem(rows, columns):
    x = torch.randn(columns, columns)
    weight = torch.randn(1, rows, columns)
    moments = (x.T @ x / columns)[None]
    return Problem(weight, moments, weight @ moments, torch.ones(1, rows), torch.tensor([6.0 * columns]))
solve(problem(2, 64), 50)  # loads what the libraries load late
large = problem(int(sys.argv[1]), int(sys.argv[2]))
before = held_bytes("VmRSS")
reset_peak()
solve(large, int(float(sys.argv[3]) * large.weight.numel()))
print(held_bytes("VmHWM") - before)
"""

FREED = """
import torch
from dsr_tool.calibrate.memory import release_freed
from dsr_tool.measure.memory.process import held_bytes
torch.ones(7 << 20)  # once 28 MiB are freed, glibc keeps blocks of that size and below
blocks = [torch.ones(1 << 18) for _ in range(200)]
del blocks[:-1]  # the last one keeps the heap from shrinking by itself
before = held_bytes("VmRSS")
release_freed()
print(before - held_bytes("VmRSS"))
"""


def told_by_a_child(code: str, *arguments: str, **environment: str) -> int:
    # A process of its own, because this one has freed blocks of earlier tests to use again.
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **environment})
    return int(done.stdout)


def net(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(width * 256, 10))


def system(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_need_grows_with_pictures_and_fitting_is_its_inverse():
    need = Need(1000, 10, 20, macs=1e15)  # too slow for views
    assert need.of(5) == 1000 + 5 * (4 * 10 + 6 * 20)
    assert [need.fitting(need.of(n), 100) for n in (1, 5, 77)] == [1, 5, 77]
    assert need.fitting(1000, 100) == need.fitting(10, 100) == 0
    bounded = Need(0, 1, memory._KEPT, macs=1e15)
    assert bounded.of(1000) == 4000 + memory._KEPT and bounded.fitting(bounded.of(1000), 2000) == 1000


def test_views_count_as_inputs():
    views = affordable_views(1.0, 10)
    assert views > 0
    assert Need(0, 10, 20, macs=1.0).of(10) == 10 * 4 * 10 + (1 + views) * 10 * 6 * 20


def test_the_largest_layer_and_activation_count():
    small, wide = memory_need(net(8), SHAPE), memory_need(net(16), SHAPE)
    assert wide.largest == 2 * small.largest == 16 * 256 and wide.pixels == small.pixels == 3 * 256
    # The linear layer has 4,096 columns in place of 2,048, and a matrix of moments has columns x columns.
    assert wide.fixed_bytes - small.fixed_bytes > 4 * memory._WITH_SYSTEMS * (4096**2 - 2048**2)
    # With 8,192 it is fitted in slices, one after another.
    assert memory_need(net(32), SHAPE).fixed_bytes < wide.fixed_bytes
    with torch.device("meta"):
        layer = nn.Linear(25088, 8)
    # All sums, and a solver for one slice.
    assert 1 < memory._fitting(layer, discover(layer)["weight"], 0) / moment_bytes(1, 25088, 1) < 2
    grouped = memory_need(nn.Sequential(nn.Conv2d(3, 64, 1), nn.Conv2d(64, 64, 3, groups=64)), SHAPE)
    assert (
        grouped.fixed_bytes < memory_need(nn.Sequential(nn.Conv2d(3, 64, 1), nn.Conv2d(64, 64, 3)), SHAPE).fixed_bytes
    )


@pytest.mark.skipif(not can_measure(), reason="the system does not tell resident memory")
@pytest.mark.parametrize("density", [0.3, 0.75])  # by the rows' own systems, and by conjugate gradients
def test_a_solver_takes_what_the_estimate_says(density):
    rows, columns = 64, 1536
    with torch.device("meta"):
        layer = nn.Linear(columns, rows)
    estimate, matrix = memory._fitting(layer, discover(layer)["weight"], 0), moment_bytes(1, columns, 1)
    if density > 0.5:
        estimate = memory._MOMENTS * matrix + memory._OWN * rows * columns  # no row has a system of its own
    there = matrix + 8 * rows * columns  # the sums, weights and targets
    peak = told_by_a_child(SOLVED, str(rows), str(columns), str(density), **ENVIRONMENT)
    assert 0.5 * estimate < there + peak <= estimate


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_blocks_go_back_to_the_system():
    assert told_by_a_child(FREED) > 150 << 20


def test_without_glibc_nothing_happens(monkeypatch):
    asked: list[object] = []
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: asked.append(name) or object())
    memory.release_freed()
    assert asked == [None]


def test_the_network_stays_as_it_is():
    module = net().train()
    memory_need(module, SHAPE)
    assert module.training and not any(child._forward_hooks for child in module.modules())
    with pytest.raises(UsageError, match="does not take inputs of shape"):
        memory_need(module, (3, 8, 8))
    assert not any(child._forward_hooks for child in module.modules())


def test_too_little_memory_names_the_pictures_that_fit(monkeypatch):
    need = memory_need(net(), SHAPE)
    monkeypatch.setattr(memory, "available_bytes", lambda: need.of(40))
    require_memory(net(), SHAPE, 40)
    with pytest.raises(UsageError, match="on 41 pictures .* --calibration-images 40"):
        require_memory(net(), SHAPE, 41)
    monkeypatch.setattr(memory, "available_bytes", lambda: 1)
    with pytest.raises(UsageError, match="not even one fits"):
        require_memory(net(), SHAPE, 16)
    monkeypatch.setattr(memory, "available_bytes", lambda: None)
    require_memory(net(), SHAPE, 10**9)


def test_the_smallest_limit_around_the_process_counts(tmp_path):
    machine = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:  8000 kB\n"}
    assert available_bytes(system(tmp_path, machine)) == 8000 * 1024
    version2 = {
        "proc/self/cgroup": "0::/user/job\n",
        "sys/fs/cgroup/user/job/memory.max": "max\n",
        "sys/fs/cgroup/user/job/memory.current": "5\n",
        "sys/fs/cgroup/user/memory.max": "7000\n",
        "sys/fs/cgroup/user/memory.current": "5000\n",
        "sys/fs/cgroup/user/memory.stat": "anon 1\nactive_file 7\ninactive_file 900\n",
    }
    assert available_bytes(system(tmp_path, version2)) == 7000 - 5000 + 900
    version1 = {
        "proc/self/cgroup": "5:cpu:/x\n4:memory,hugetlb:/x\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "600\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "100\n",
    }
    assert available_bytes(system(tmp_path, version1)) == 500
    assert available_bytes(tmp_path / "other system") is None


def test_this_machine_has_memory_where_it_tells():
    found = available_bytes()
    assert found is None or found > torch.zeros(1).nbytes
