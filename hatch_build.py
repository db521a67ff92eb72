"""Builds the kernels: compiles the C++ sources to one shared library for each level of the processor.

Hatchling calls `KernelsHook` for wheels and editable installs; `python hatch_build.py` does the same in a checkout.
Environment variables:

- `CXX`: command of the compiler; otherwise `c++`, `g++`, `clang++`, or Zig's compiler from the package `ziglang`.
- `DSR_TOOL_KERNELS=none`: builds no kernels.
- `DSR_TOOL_REQUIRE_KERNELS=1`: warnings are errors, and a level that cannot be built fails the build.
- `DSR_TOOL_WHEEL_PLATFORM`: platform of the wheel's tag, for builders who know that the libraries run on it, such as
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
"""Folder of the sources, and of the libraries in the package."""
RECORD = "_kernels.json"
"""Name of the file beside the libraries that says what each was compiled from, and its SHA-256."""
SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
LEVELS = {
    "x86_64": {"avx512": "x86-64-v4", "avx2": "x86-64-v3", "baseline": "x86-64"},
    "aarch64": {"neon": ""},
}
"""Value of -march for each level, by machine; other machines have `baseline` alone, with the compiler's default."""

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
    """Returns the command of a C++ compiler; None if there is none."""
    if own := os.environ.get("CXX"):
        return shlex.split(own)
    for name in ("c++", "g++", "clang++"):
        # macOS has commands of these names that only offer to install a compiler.
        if (path := shutil.which(name)) and _version([path]):
            return [path]
    return [sys.executable, "-m", "ziglang", "c++"] if importlib.util.find_spec("ziglang") else None


def _version(command: list[str]) -> str:
    """Returns the compiler's version; empty if it does not run."""
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
    """A compilation of all levels.

    Attributes:
        command: command of the compiler.
        sources: folder of the C++ files and of the table that they include.
        output: folder of the libraries.
        machine: `x86_64`, `aarch64` or another name of `platform.machine()`.
        sanitize: whether the libraries check addresses and undefined behaviour while running.
        strict: whether warnings are errors.
    """

    command: list[str]
    sources: Path
    output: Path
    machine: str
    sanitize: bool = False
    strict: bool = False

    def run(self) -> dict[str, str]:
        """Compiles every level whose sources, flags or compiler have changed, in parallel.

        Returns:
            The compiler's message for each level that could not be compiled; such a level has no library any more.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        levels, version = LEVELS.get(self.machine, {"baseline": ""}), _version(self.command)
        record = _read(self.output / RECORD)
        digests = {level: self._digest(level, version) for level in levels}
        due = [level for level in levels if not self._is_built(level, digests[level], record)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            failed = {
                level: message for level, message in zip(due, pool.map(self._compile, due), strict=True) if message
            }
        kept = {level: self._entry(level, digests[level]) for level in levels if level not in failed}
        (self.output / RECORD).write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        return failed

    def library(self, level: str) -> Path:
        """Returns the path of a level's library."""
        return self.output / f"_kernels_{level}{SUFFIX}"

    def flags(self, level: str) -> list[str]:
        """Returns the compiler's flags for a level."""
        # The namespace of everything that depends on the width of vectors (kernels/level.h).
        flags = [f"-DDSR_LEVEL={level}", *FLAGS, *(SANITIZERS if self.sanitize else ()), *(["-Werror"] if self.strict else [])]
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
        """Compiles one level. Returns the compiler's message if it failed, otherwise an empty string."""
        target = self.library(level)
        with tempfile.TemporaryDirectory(dir=self.output) as folder:
            part = Path(folder) / target.name
            command = [*self.command, *self.flags(level), *map(str, sorted(self.sources.glob("*.cpp")))]
            try:
                done = subprocess.run(  # noqa: S603 - the compiler that the user has
                    [*command, "-o", str(part)], capture_output=True, text=True, check=False, errors="replace"
                )
                message = (done.stderr.strip() or f"exit code {done.returncode}") if done.returncode else ""
            except OSError as error:
                message = str(error.strerror)
            # Processes that have mapped the old file keep it. After a failure, no outdated library may stay.
            target.unlink(missing_ok=True) if message else part.replace(target)
        return message

    def _digest(self, level: str, version: str) -> str:
        digest = hashlib.sha256(json.dumps([self.command, version, self.flags(level)]).encode())
        for path in sorted(path for ending in ("cpp", "h", "def") for path in self.sources.glob(f"*.{ending}")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
        return digest.hexdigest()

    def _is_built(self, level: str, digest: str, record: dict[str, Any]) -> bool:
        path = self.library(level)
        return path.is_file() and record.get(level) == self._entry(level, digest)

    def _entry(self, level: str, digest: str) -> dict[str, str]:
        """Returns a level's entry in the record; the runtime refuses a library whose SHA-256 differs from it."""
        return {"made_from": digest, "sha256": hashlib.sha256(self.library(level).read_bytes()).hexdigest()}


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


class KernelsHook(BuildHookInterface):  # type: ignore[type-arg]
    """Compiles the kernels into the package, and tags the wheel with this platform."""

    def dependencies(self) -> list[str]:
        """Returns Zig's compiler, from the package index, if the machine has no compiler."""
        wanted = os.environ.get("DSR_TOOL_KERNELS") != "none"
        return [_ZIG] if wanted and compiler() is None and platform.machine().lower() in _ZIG_MACHINES else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 - hatchling's signature
        """Builds, and warns once if that fails; without any library the wheel is pure and predictions run on scipy."""
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
    """Compiles every level. Returns one message about what failed, otherwise an empty string."""
    command = compiler()
    if command is None:
        return "dsr-tool: found no C++ compiler (CXX, c++, g++, clang++) and no ziglang; predictions run on scipy."
    failed = Build(command, sources, output, machine or _machine(), sanitize, strict).run()
    if not failed:
        return ""
    # Levels share their sources, so one message usually stands for all of them.
    first = "\n".join(next(iter(failed.values())).splitlines()[:30])
    return f"dsr-tool: the kernels for {', '.join(failed)} were not built with {shlex.join(command)}:\n{first}"


def _platform() -> str:
    """Returns the platform of the wheel's tag: this one, since a local compiler guarantees no other."""
    if own := os.environ.get("DSR_TOOL_WHEEL_PLATFORM"):
        return own
    if sys.platform == "darwin":
        return f"macosx_{_MACOS.replace('.', '_')}_{platform.machine()}"
    return sysconfig.get_platform().replace("-", "_").replace(".", "_")


def main() -> None:
    """Builds in a checkout, with warnings as errors."""
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
