"""The sizes of caches: where they come from, and what follows from them."""

import numpy as np
import pytest

from dsr_tool.graph.windows import Window
from dsr_tool.runtime.compiler import machine, op, spmm
from dsr_tool.runtime.compiler.layouts import Grid, Planes
from dsr_tool.runtime.kernels import cpu
from dsr_tool.runtime.kernels.library import library
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor


@pytest.fixture
def system(monkeypatch, tmp_path):
    """Returns a function that sets what the system tells: sysfs entries (level, type, size), sysconf and sysctl."""

    def tell(entries=(), sysconf=0, platform="linux", sysctl=()):
        for index, names in enumerate(entries):
            folder = tmp_path / f"index{index}"
            folder.mkdir()
            for name, text in zip(("level", "type", "size"), names, strict=False):
                (folder / name).write_text(f"{text}\n")
        monkeypatch.setattr(cpu, "_SYSFS", tmp_path)
        monkeypatch.setattr(cpu, "_sysconf", lambda _: sysconf)
        monkeypatch.setattr(cpu.sys, "platform", platform)
        monkeypatch.setattr(cpu, "_sysctl_number", lambda name: dict(sysctl).get(name, 0))
        return cpu.caches.__wrapped__()

    return tell


@pytest.mark.parametrize(
    ("told", "caches"),
    [
        ({"entries": [(1, "Data", "48K"), (1, "Instruction", "32K"), (2, "Unified", "2048K")]}, (48, 2048)),
        ({"entries": [(1, "Unified", "64K")]}, (64, 512)),
        ({"entries": [(1, "Data", "many"), (2, "Unified")]}, (32, 512)),
        ({"sysconf": 128 << 10}, (128, 128)),
        ({}, (32, 512)),
        (
            {"platform": "darwin", "sysctl": {"hw.perflevel0.l1dcachesize": 131072, "hw.l2cachesize": 4194304}},
            (128, 4096),
        ),
    ],
)
def test_caches_are_what_the_system_tells_else_documented_sizes(system, told, caches):
    assert tuple(size >> 10 for size in system(**told)) == caches


@pytest.mark.parametrize(("kib", "rounded"), [(16, 32), (32, 32), (47, 32), (48, 48), (64, 64), (128, 64)])
def test_first_level_caches_are_rounded_to_few_classes(kib, rounded):
    assert op.l1_class(kib << 10) == rounded << 10


def test_plans_for_other_levels_assume_the_cache_of_most_processors_that_run_them(monkeypatch):
    monkeypatch.setattr(op, "caches", lambda: cpu.Caches(64 << 10, 1 << 20))
    assert op.level_l1("avx512", runs=True) == op.level_l1("avx2", runs=True) == 64 << 10
    assert op.level_l1("avx512", runs=False) == 48 << 10
    assert op.level_l1("avx2", runs=False) == op.level_l1("neon", runs=False) == 32 << 10


@pytest.mark.skipif(library() is None, reason="no kernels")
def test_plans_are_made_for_the_caches_of_this_processor(monkeypatch):
    monkeypatch.setattr(machine, "caches", lambda: cpu.Caches(50 << 10, 1 << 20))
    target = machine.Machine(library(), 1).target
    assert (target.l1_bytes, target.l2_bytes) == (48 << 10, 1 << 20)


def channels_of_a_block(kernel, l1_kib, groups=1, every=2):
    """Returns the input channels of a block of an op of 512 channels on planes of 103 vectors of 16 lanes.

    Args:
        kernel: height and width of the kernel.
        l1_kib: first-level cache in KiB.
        groups: number of groups of channels.
        every: distance between two active weights.
    """
    source, out = (Planes((1, 512, 40, 40), Grid(40, 40, 1, 16), 1) for _ in range(2))
    weight = np.zeros((8 if groups == 1 else 512, 512 // groups, kernel, kernel), np.float32)
    weight.reshape(len(weight), -1)[:, ::every] = 1
    pad = kernel // 2
    one = spmm.Spmm(
        source=source, out=out, weight=SparseTensor.from_dense(weight, Mask.from_bool(weight != 0)),
        bias=np.zeros(len(weight), np.float32), window=Window((kernel, kernel), (1, 1), (1, 1), (pad, pad), (pad, pad)),
        groups=groups, weight_name=("Conv", "w"), target=op.Target(16, 1, 14, 6, l1_kib << 10),
    )  # fmt: skip
    offsets = spmm.offsets_of(one.window, source, out)
    _, channels = one._tiling(spmm.Taps(tuple(offsets), source.stride))
    return channels


@pytest.mark.parametrize("kernel", [1, 3])
def test_blocks_grow_with_the_first_level_cache(kernel):
    small, medium, large = (channels_of_a_block(kernel, kib) for kib in (32, 48, 64))
    assert small < medium < large
    # Blocks have about equal sizes, so they follow the cache in steps.
    assert medium / small == pytest.approx(1.5, rel=0.2)


def test_blocks_with_48_kib_are_those_that_were_measured():
    assert spmm.CACHE_SHARE * (48 << 10) == 40 << 10
    assert spmm.POINT_SHARE * (48 << 10) == 36 << 10


def test_few_records_are_worth_a_block_where_the_cache_is_small():
    # 1 weight in 20: what fits in the cache would give each output channel 2 records.
    small, medium = (channels_of_a_block(1, kib, every=20) for kib in (32, 48))
    assert medium / small == pytest.approx(1.5, rel=0.2)
    assert medium / 20 == pytest.approx(spmm.POINT_RECORDS, rel=0.2)


@pytest.mark.parametrize("l1_kib", [32, 48])
def test_whole_planes_of_depthwise_convolutions_stay_in_the_cache(l1_kib):
    plane_bytes = 103 * 64
    channels = channels_of_a_block(3, l1_kib, groups=512, every=1)
    assert channels * plane_bytes <= 1.02 * (l1_kib << 10) < 2 * channels * plane_bytes
