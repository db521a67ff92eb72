"""The levels of the kernels that this processor and its operating system run."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

__all__ = ["LEVELS", "missing_features", "supported_levels"]

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


def _sysctl(name: str) -> bool:
    try:
        done = subprocess.run(["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, check=False)  # noqa: S603
    except OSError:
        return False
    return done.stdout.strip() == "1"
