"""What this processor and its operating system offer the kernels: instructions, and sizes of caches."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

__all__ = ["CACHES", "LEVELS", "Caches", "caches", "missing_features", "supported_levels"]

LEVELS = ("avx512", "avx2", "neon", "baseline")
"""All levels, fastest first; a build has those of its machine."""

# Micro-architecture levels 3 and 4 of the x86-64 psABI, as /proc/cpuinfo spells their features. Linux lists a feature
# only if it saves the registers on a task switch, so nothing else has to be checked.
_V3 = (
    *("abm", "avx", "avx2", "bmi1", "bmi2", "cx16", "f16c", "fma", "lahf_lm", "movbe", "pni", "popcnt"),
    *("sse4_1", "sse4_2", "ssse3", "xsave"),
)
_NEEDED = {"avx2": _V3, "avx512": (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")}

# macOS lists fewer features; every Mac with AVX2 has all of level 3.
_MACOS = {
    "avx2": ("avx2_0", "bmi1", "bmi2", "f16c", "fma"),
    "avx512": ("avx2_0", "bmi2", "fma", "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"),
}


def supported_levels() -> tuple[str, ...]:
    """Returns the levels that run here, fastest first; the baseline alone if the system does not tell its features."""
    machine = platform.machine().lower()
    if machine in ("aarch64", "arm64"):
        return ("neon",)
    if machine not in ("x86_64", "amd64"):
        return ("baseline",)
    return tuple(level for level in LEVELS if level != "neon" and not missing_features(level))


def missing_features(level: str) -> list[str]:
    """Returns the features that `level` needs and this x86-64 processor lacks, by Linux's names."""
    if level not in _NEEDED:
        return []
    if sys.platform == "darwin":
        return [name for name in _MACOS[level] if not _sysctl(f"hw.optional.{name}")]
    flags = _cpu_flags(Path("/proc/cpuinfo"))
    return [name for name in _NEEDED[level] if name not in flags]


def _cpu_flags(path: Path) -> frozenset[str]:
    """Returns the flags of the first processor; none if the file does not exist."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))


class Caches(NamedTuple):
    """The caches of one core.

    Attributes:
        l1: bytes of the first-level data cache.
        l2: bytes of the second-level cache.
    """

    l1: int
    l2: int


CACHES = Caches(32 << 10, 512 << 10)
"""The caches that are assumed where the system does not tell: those of Zen 2 and 3; few processors have less."""

_SYSFS = Path("/sys/devices/system/cpu/cpu0/cache")


@functools.cache
def caches() -> Caches:
    """Returns the caches of the first core; of one that the system does not tell, the size in `CACHES`."""
    found = _linux_caches(_SYSFS)
    if sys.platform == "darwin":
        # Of the fast cores, where a processor has two kinds of them.
        found = {
            level: _sysctl_number(f"hw.perflevel0.{name}") or _sysctl_number(f"hw.{name}")
            for level, name in ((1, "l1dcachesize"), (2, "l2cachesize"))
        }
    return Caches(*(found.get(level) or _sysconf(level) or CACHES[level - 1] for level in (1, 2)))


def _linux_caches(folder: Path) -> dict[int, int]:
    """Returns the bytes of each cache that holds data, by level; none if the system has no such folder."""
    found: dict[int, int] = {}
    for index in sorted(folder.glob("index*")):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
            if kind in ("Data", "Unified"):
                found[int(level)] = int(size.removesuffix("K")) << 10
        except (OSError, ValueError):
            continue
    return found


def _sysconf(level: int) -> int:
    """Returns the bytes of a cache as the C library tells them; 0 if it does not."""
    name = {1: "SC_LEVEL1_DCACHE_SIZE", 2: "SC_LEVEL2_CACHE_SIZE"}[level]
    try:
        return max(os.sysconf(name), 0)
    except (AttributeError, OSError, ValueError):
        return 0  # Windows has no sysconf, and other systems not these names


def _sysctl(name: str) -> bool:
    return _sysctl_number(name) == 1


def _sysctl_number(name: str) -> int:
    try:
        done = subprocess.run(["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, check=False)  # noqa: S603
        return int(done.stdout)
    except (OSError, ValueError):
        return 0
