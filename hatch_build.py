"""Builds the kernels: C++ sources to one shared library per level of the processor, when the package is built.

Hatchling calls `KernelsHook` for wheels and editable installs; `python hatch_build.py` does the same in the checkout.
The environment says what else:

- `CXX`: the compiler, as a command; otherwise `c++`, `g++`, `clang++`, or Zig's from the package `ziglang`.
- `DSR_TOOL_KERNELS=none`: build none.
- `DSR_TOOL_REQUIRE_KERNELS=1`: warnings are errors, and a level that cannot be built fails the build.
- `DSR_TOOL_WHEEL_PLATFORM`: the platform of the wheel's tag, for builders who know that it holds, such as
  `manylinux_2_17_x86_64`.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

__all__ = ["Build", "KernelsHook", "compiler", "main"]

NATIVE = Path("dsr_tool") / "runtime" / "kernels"
RECORD = "_kernels.json"
SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
LEVELS = {
    "x86_64": {"avx512": "x86-64-v4", "avx2": "x86-64-v3", "baseline": "x86-64"},
    "aarch64": {"neon": ""},
}
"""By machine, the value of -march for each level; elsewhere there is `baseline` alone, with the compiler's own."""

FLAGS = (
    "-std=c++17",
    "-ffp-contract=fast",
    "-O3",
    "-fPIC",
    "-shared",
    "-pthread",
    "-fno-exceptions",
    "-fno-rtti",
    "-Wall",
    "-Wextra",
)
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g")
_ZIG = "ziglang>=0.13"
_ZIG_MACHINES = ("x86_64", "aarch64", "arm64", "amd64")
_MACOS = "11.0"


def compiler() -> list[str] | None:
    """The command of a C++ compiler; None where there is none."""
    if own := os.environ.get("CXX"):
        return shlex.split(own)
    for name in ("c++", "g++", "clang++"):
        # macOS has commands of these names that only offer to install a compiler.
        if (path := shutil.which(name)) and _version([path]):
            return [path]
    return [sys.executable, "-m", "ziglang", "c++"] if importlib.util.find_spec("ziglang") else None


def _version(command: list[str]) -> str:
    """What the compiler calls itself; empty where it does not run."""
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)  # noqa: S603
    except OSError:
        return ""
    return done.stdout if done.returncode == 0 else ""


def _machine() -> str:
    name = platform.machine().lower()
    name = {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)
    return name if sys.maxsize > 2**32 else f"{name}, 32 bits"


@dataclass(frozen=True)
class Build:
    """What to compile, and how.

    Attributes:
        command: of the compiler.
        sources: folder of the C++ files.
        output: folder of the libraries.
        machine: `x86_64`, `aarch64` or another name of `platform.machine()`.
        sanitize: find wrong addresses and undefined behaviour while running.
        strict: warnings are errors.
    """

    command: list[str]
    sources: Path
    output: Path
    machine: str
    sanitize: bool = False
    strict: bool = False

    def run(self) -> dict[str, str]:
        """Compile every level whose sources, flags or compiler have changed, side by side.

        Returns:
            By level that could not be compiled, what the compiler said. Of such a level no library is left.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        levels, version = LEVELS.get(self.machine, {"baseline": ""}), _version(self.command)
        record = _read(self.output / RECORD)
        digests = {level: self._digest(level, version) for level in levels}
        due = [level for level in levels if not self._is_built(level, digests[level], record)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            failed = {level: said for level, said in zip(due, pool.map(self._compile, due), strict=True) if said}
        kept = {level: self._entry(level, digests[level]) for level in levels if level not in failed}
        (self.output / RECORD).write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        return failed

    def library(self, level: str) -> Path:
        """Where the library of a level lies."""
        return self.output / f"_kernels_{level}{SUFFIX}"

    def flags(self, level: str) -> list[str]:
        """Of the compiler, for a level."""
        flags = [*FLAGS, *(SANITIZERS if self.sanitize else ()), *(["-Werror"] if self.strict else [])]
        if march := LEVELS.get(self.machine, {}).get(level):
            # Zig spells the same levels with underscores.
            flags.append(f"-march={march.replace('-', '_') if self._zig else march}")
        if sys.platform == "darwin":
            return [*flags, f"-mmacosx-version-min={_MACOS}"]
        # The kernels use nothing of the C++ library, and Zig would leave debugging symbols of it inside.
        return [*flags, "-Wl,--as-needed", *(["-Wl,-s"] if self._zig else [])]

    @property
    def _zig(self) -> bool:
        return any("zig" in Path(word).name for word in self.command)

    def _compile(self, level: str) -> str:
        """Compile one level; returns what the compiler said where it failed."""
        target = self.library(level)
        with tempfile.TemporaryDirectory(dir=self.output) as folder:
            part = Path(folder) / target.name
            command = [*self.command, *self.flags(level), *map(str, sorted(self.sources.glob("*.cpp")))]
            try:
                done = subprocess.run(  # noqa: S603 - the compiler that the user has
                    [*command, "-o", str(part)], capture_output=True, text=True, check=False, errors="replace"
                )
                said = (done.stderr.strip() or f"exit code {done.returncode}") if done.returncode else ""
            except OSError as error:
                said = str(error.strerror)
            # Whoever has the old file mapped keeps it; one that is out of date is not left for others.
            target.unlink(missing_ok=True) if said else part.replace(target)
        return said

    def _digest(self, level: str, version: str) -> str:
        digest = hashlib.sha256(json.dumps([self.command, version, self.flags(level)]).encode())
        for path in sorted(path for ending in ("cpp", "h", "def") for path in self.sources.glob(f"*.{ending}")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
        return digest.hexdigest()

    def _is_built(self, level: str, digest: str, record: dict[str, Any]) -> bool:
        path = self.library(level)
        return path.is_file() and record.get(level) == self._entry(level, digest)

    def _entry(self, level: str, digest: str) -> dict[str, str]:
        """What the record holds: the runtime refuses a library whose bytes are others."""
        return {"made_from": digest, "sha256": hashlib.sha256(self.library(level).read_bytes()).hexdigest()}


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


class KernelsHook(BuildHookInterface):  # type: ignore[type-arg]
    """Compiles the kernels into the package, and marks the wheel as one of this platform."""

    def dependencies(self) -> list[str]:
        """Zig's compiler from the package index, where the machine has none."""
        wanted = os.environ.get("DSR_TOOL_KERNELS") != "none"
        return [_ZIG] if wanted and compiler() is None and platform.machine().lower() in _ZIG_MACHINES else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 - hatchling's signature
        """Build, and say once what failed; without any library the package runs on scipy, and its wheel is pure."""
        if os.environ.get("DSR_TOOL_KERNELS") == "none":
            return
        native, strict = Path(self.root) / NATIVE, os.environ.get("DSR_TOOL_REQUIRE_KERNELS") == "1"
        message = _build(native, native, strict=strict)
        if message and strict:
            raise RuntimeError(message)
        if message:
            self.app.display_warning(message)
        if any(native.glob(f"_kernels_*{SUFFIX}")):
            build_data["artifacts"] += [f"/{NATIVE.as_posix()}/_kernels_*{SUFFIX}", f"/{NATIVE.as_posix()}/{RECORD}"]
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{_platform()}"


def _build(sources: Path, output: Path, *, strict: bool, sanitize: bool = False, machine: str = "") -> str:
    """Compile every level; returns what went wrong as one message, or nothing."""
    command = compiler()
    if command is None:
        return "dsr-tool: there is no C++ compiler (CXX, c++, g++, clang++) and no ziglang; predictions run on scipy."
    failed = Build(command, sources, output, machine or _machine(), sanitize, strict).run()
    if not failed:
        return ""
    # The levels share their sources, so that the first message mostly is everyone's.
    said = "\n".join(next(iter(failed.values())).splitlines()[:30])
    return f"dsr-tool: the kernels for {', '.join(failed)} were not built with {shlex.join(command)}:\n{said}"


def _platform() -> str:
    """The platform of the wheel's tag: this one, since a local compiler promises no other."""
    if own := os.environ.get("DSR_TOOL_WHEEL_PLATFORM"):
        return own
    if sys.platform == "darwin":
        return f"macosx_{_MACOS.replace('.', '_')}_{platform.machine()}"
    return sysconfig.get_platform().replace("-", "_").replace(".", "_")


def main() -> None:
    """Build in the checkout, every warning an error."""
    parser = argparse.ArgumentParser(description="Build the kernels.")
    here = Path(__file__).parent / NATIVE
    parser.add_argument("--output", type=Path, default=here, help="folder of the libraries")
    parser.add_argument("--machine", default="", help="x86_64 or aarch64, for a CXX that compiles for another machine")
    parser.add_argument("--sanitize", action="store_true", help="with AddressSanitizer and UndefinedBehaviorSanitizer")
    arguments = parser.parse_args()
    message = _build(here, arguments.output, strict=True, sanitize=arguments.sanitize, machine=arguments.machine)
    sys.exit(message or None)


if __name__ == "__main__":
    main()
