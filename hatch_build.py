"""Builds the kernels: a shared library for each level of the processor, and one of all levels for C programs.

Hatchling calls `KernelsHook` for wheels and editable installs; `python hatch_build.py` does the same in a checkout.
Environment variables:

- `CXX`: command of the compiler; otherwise `c++`, `g++`, `clang++`, or Zig's compiler from the package `ziglang`.
- `DSR_TOOL_KERNELS=none`: builds no kernels.
- `DSR_TOOL_REQUIRE_KERNELS=1`: warnings are errors, and a level that cannot be built fails the build.
- `DSR_TOOL_WHEEL_PLATFORM`: platform of the wheel's tag. For one like `manylinux_2_17_aarch64`, Zig's compiler builds
  for that machine and that version of the C library, on any machine; a `CXX` is trusted to do so.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import re
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
DEPLOY = Path("dsr_tool") / "runtime" / "deploy"
"""Folder of the sources of the library for C programs."""
OBJECTS = "_objects"
"""Name of the folder beside the libraries that keeps compiled files, so that only changed ones are compiled again."""
RECORD = "_kernels.json"
"""Name of the file beside the libraries that says what each was compiled from, and its SHA-256."""
SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
LIBRARY = "libdsr"
"""Name of the library for C programs, without its suffix; it holds all levels of its machine."""
EXPORTED = (
    *("dsr_open", "dsr_open_memory", "dsr_close", "dsr_run", "dsr_text", "dsr_last_error"),
    *("dsr_input", "dsr_output", "dsr_input_count", "dsr_output_count", "dsr_level"),
    "RegisterCustomOps",  # what ONNX Runtime calls
)
"""Functions that this library exports; all other names are its own, so that two copies fit into one process."""
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
    "-pthread",
    "-fno-exceptions",
    "-fno-rtti",
    "-Wall",
    "-Wextra",
)
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g")
_ONCE = ("threads", "pack")
"""Names of the files of the kernels that do not depend on the level begin with these."""
_ZIG = "ziglang>=0.13"
_ZIG_MACHINES = ("x86_64", "aarch64", "arm64", "amd64")
_MANYLINUX = re.compile(r"manylinux_(\d+_\d+)_(x86_64|aarch64)")
"""Platforms of wheels that Zig's compiler builds for on any machine: the version of the C library, and the machine."""
_MACOS = "11.0"


def compiler() -> list[str] | None:
    """Returns the command of a C++ compiler; None if there is none."""
    if own := os.environ.get("CXX"):
        return shlex.split(own)
    zig = [sys.executable, "-m", "ziglang", "c++"] if importlib.util.find_spec("ziglang") else None
    if (libc := _manylinux()) is not None:
        return zig and [*zig, "-target", f"{libc[2]}-linux-gnu.{libc[1].replace('_', '.')}"]
    for name in ("c++", "g++", "clang++"):
        # macOS has commands of these names that only offer to install a compiler.
        if (path := shutil.which(name)) and _version([path]):
            return [path]
    return zig


def _manylinux() -> re.Match[str] | None:
    """Returns the C library and the machine that the wheel's platform names; None if it names none."""
    return _MANYLINUX.fullmatch(os.environ.get("DSR_TOOL_WHEEL_PLATFORM", ""))


def _version(command: list[str]) -> str:
    """Returns the compiler's version; empty if it does not run."""
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)  # noqa: S603
    except OSError:
        return ""
    return done.stdout if done.returncode == 0 else ""


def _machine() -> str:
    """Returns the machine that the wheel is for: this one, unless its platform names another."""
    if (libc := _manylinux()) is not None:
        return libc[2]
    name = platform.machine().lower()
    name = {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)
    return name if sys.maxsize > 2**32 else f"{name}, 32 bits"


@dataclass(frozen=True)
class Build:
    """A compilation of all levels, and of the library for C programs.

    Attributes:
        command: command of the compiler.
        sources: folder of the C++ files of the kernels, and of the table that they include.
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
        """Compiles every library whose sources, flags or compiler have changed, file by file in parallel.

        Returns:
            The compiler's message for each library that could not be built; it does not exist any more.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        record, objects = _read(self.output / RECORD), self._objects()
        digests = {name: self._digest(name, objects) for name in self.libraries}
        due = [name for name in self.libraries if not self._is_built(name, digests[name], record)]
        failed = self._build(due, objects) if due else {}
        kept = {name: self._entry(name, digests[name]) for name in self.libraries if name not in failed}
        (self.output / RECORD).write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        return failed

    @property
    def libraries(self) -> list[str]:
        """Names of all libraries: the levels, and the one for C programs if its sources are there."""
        return [*self.levels, *([LIBRARY] if self.deploy.is_dir() else [])]

    @property
    def levels(self) -> list[str]:
        """Levels of the machine, fastest first."""
        return list(LEVELS.get(self.machine, {"baseline": ""}))

    @property
    def deploy(self) -> Path:
        """Folder of the sources of the library for C programs."""
        return self.sources.parent / DEPLOY.name

    def library(self, name: str) -> Path:
        """Returns the path of a level's library, or of the one for C programs."""
        return self.output / f"{name if name == LIBRARY else f'_kernels_{name}'}{SUFFIX}"

    def flags(self, level: str) -> list[str]:
        """Returns the compiler's flags for a level; those of the lowest for what does not depend on the level."""
        level = self.levels[-1] if level == LIBRARY else level
        # The namespace of everything that depends on the width of vectors (kernels/level.h).
        flags = [f"-DDSR_LEVEL={level}", *FLAGS, *(SANITIZERS if self.sanitize else ())]
        flags += [f"-DDSR_LEVELS={' '.join(f'X({one})' for one in self.levels)}", *(["-Werror"] if self.strict else [])]
        if march := LEVELS.get(self.machine, {}).get(level):
            # Zig spells the same levels with underscores.
            flags.append(f"-march={march.replace('-', '_') if self._zig else march}")
        return [*flags, *([f"-mmacosx-version-min={_MACOS}"] if sys.platform == "darwin" else [])]

    def parts(self, name: str) -> list[tuple[str, Path]]:
        """Returns the files that a library is linked from, each with the level that it is compiled for."""
        kernels = sorted(self.sources.glob("*.cpp"))
        if name != LIBRARY:
            return [(name, path) for path in kernels]
        # What trains, and what Python calls, is in the libraries of single levels alone.
        wanted = [path for path in kernels if not path.name.startswith(("train_", "exports"))]
        once = [path for path in wanted if path.name.startswith(_ONCE)]
        own = [(LIBRARY, path) for path in (*once, *sorted(self.deploy.glob("*.cpp")))]
        return own + [(level, path) for level in self.levels for path in wanted if path not in once]

    @property
    def _zig(self) -> bool:
        return any("zig" in Path(word).name for word in self.command)

    def _objects(self) -> dict[tuple[str, Path], Path]:
        """Returns the object file of every part. Its name has a digest of all that it is compiled from."""
        compiler = [self.command, _version(self.command)]
        kernels = _texts(self.sources, ("h", "def"))
        deploy = kernels + _texts(self.deploy, ("h",)) + _texts(self.deploy / "include", ("h",))
        objects = {}
        for level, path in dict.fromkeys(part for name in self.libraries for part in self.parts(name)):
            included = deploy if path.parent == self.deploy else kernels
            made_from = json.dumps([*compiler, self.flags(level), path.name]).encode() + path.read_bytes() + included
            digest = hashlib.sha256(made_from).hexdigest()[:16]
            objects[level, path] = self.output / OBJECTS / f"{level}_{path.stem}_{digest}.o"
        return objects

    def _build(self, due: list[str], objects: dict[tuple[str, Path], Path]) -> dict[str, str]:
        """Compiles and links libraries. Returns the compiler's message for each that failed."""
        (self.output / OBJECTS).mkdir(exist_ok=True)
        parts = {name: self.parts(name) for name in due}
        files = list(dict.fromkeys(part for name in due for part in parts[name]))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = pool.map(lambda part: self._compiled(part, objects[part]), files)
            messages = dict(zip(files, compiled, strict=True))
        failed = {}
        for name in due:
            message = next((messages[part] for part in parts[name] if messages[part]), "")
            if message := message or self._link(name, [objects[part] for part in parts[name]]):
                # After a failure, no outdated library may stay.
                self.library(name).unlink(missing_ok=True)
                failed[name] = message
        for outdated in set((self.output / OBJECTS).iterdir()) - set(objects.values()):
            outdated.unlink(missing_ok=True)
        return failed

    def _compiled(self, part: tuple[str, Path], made: Path) -> str:
        """Compiles a part unless that was done before. Returns the compiler's message if it failed."""
        if made.exists():
            return ""
        level, path = part
        with tempfile.TemporaryDirectory(dir=self.output) as folder:
            message = self._call(level, ["-c", str(path)], Path(folder) / made.name)
            if not message:
                (Path(folder) / made.name).replace(made)
        return message

    def _link(self, name: str, objects: list[Path]) -> str:
        """Links a library. Returns the compiler's message if it failed."""
        with tempfile.TemporaryDirectory(dir=self.output) as folder:
            new = Path(folder) / self.library(name).name
            message = self._call(name, self._linked(name, objects, folder), new)
            if not message:
                # Processes that have mapped the old file keep it.
                new.replace(self.library(name))
        return message

    def _linked(self, name: str, objects: list[Path], folder: str) -> list[str]:
        """Returns the arguments that link a library."""
        arguments = ["-shared", *map(str, objects)]
        if sys.platform == "darwin":
            listed = Path(folder) / "exported"
            listed.write_text("".join(f"_{one}\n" for one in EXPORTED), encoding="utf-8")
            return [*arguments, *([f"-Wl,-exported_symbols_list,{listed}"] if name == LIBRARY else [])]
        # The kernels use nothing of the C++ library, which Zig would compile first. It leaves debugging symbols inside.
        arguments += ["-Wl,--as-needed", *(["-nostdlib++", "-Wl,-s"] if self._zig else ["-static-libgcc"])]
        if name == LIBRARY:
            listed = Path(folder) / "exported"
            listed.write_text(f"{{ global: {'; '.join(EXPORTED)}; local: *; }};\n", encoding="utf-8")
            arguments += [f"-Wl,--version-script={listed}", f"-Wl,-soname,{LIBRARY}{SUFFIX}"]
        return arguments

    def _call(self, level: str, arguments: list[str], output: Path) -> str:
        """Runs the compiler. Returns its message if it failed, otherwise an empty string."""
        try:
            done = subprocess.run(  # noqa: S603 - the compiler that the user has
                [*self.command, *self.flags(level), *arguments, "-o", str(output)],
                capture_output=True,
                text=True,
                check=False,
                errors="replace",
            )
        except OSError as error:
            return str(error.strerror)
        return (done.stderr.strip() or f"exit code {done.returncode}") if done.returncode else ""

    def _digest(self, name: str, objects: dict[tuple[str, Path], Path]) -> str:
        made_from = [[objects[part].name for part in self.parts(name)], EXPORTED]
        return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()

    def _is_built(self, name: str, digest: str, record: dict[str, Any]) -> bool:
        path = self.library(name)
        return path.is_file() and record.get(name) == self._entry(name, digest)

    def _entry(self, name: str, digest: str) -> dict[str, str]:
        """Returns a library's entry in the record; the runtime refuses a library whose SHA-256 differs from it."""
        return {"made_from": digest, "sha256": hashlib.sha256(self.library(name).read_bytes()).hexdigest()}


def _texts(folder: Path, endings: tuple[str, ...]) -> bytes:
    """Returns the names and contents of a folder's files with these endings; empty without that folder."""
    files = sorted(path for ending in endings for path in folder.glob(f"*.{ending}"))
    return b"".join(path.name.encode() + b"\0" + path.read_bytes() for path in files)


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
            built = (f"_kernels_*{SUFFIX}", f"{LIBRARY}{SUFFIX}", RECORD)
            build_data["artifacts"] += [f"/{NATIVE.as_posix()}/{name}" for name in built]
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
