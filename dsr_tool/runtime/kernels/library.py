"""The shared library of the kernels: finds, checks and loads it once.

The fastest level that this processor runs is loaded, unless `DSR_TOOL_KERNELS` says otherwise: `none` for scipy, a
level (`baseline`, `avx2`, `avx512`, `neon`), or the path of a library, such as one built with sanitizers.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dsr_tool.errors import UsageError, first_line, unknown_name
from dsr_tool.runtime.kernels.cpu import LEVELS, missing_features, supported_levels
from dsr_tool.runtime.kernels.ops import ABI

__all__ = ["ABI", "FOLDER", "SUFFIX", "VARIABLE", "Kernels", "choose", "kernels", "level", "library"]

VARIABLE = "DSR_TOOL_KERNELS"
"""Environment variable that selects the kernels."""

FOLDER = Path(__file__).parent
"""Folder of the libraries that were built."""
_RECORD = "_kernels.json"
SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
"""Ending of shared libraries on this system."""
_REMEDY = "install dsr-tool again, or run `make kernels` in a checkout"


@dataclass(frozen=True)
class Kernels:
    """The result of looking for kernels.

    Attributes:
        library: the loaded library; None if predictions run on scipy.
        level: level of that library; `custom` if it was given by its path.
        built: levels whose library exists, fastest first.
        problems: a sentence for each library that should have been loaded and was not.
    """

    library: ctypes.CDLL | None
    level: str | None
    built: tuple[str, ...]
    problems: tuple[str, ...]


def library() -> ctypes.CDLL | None:
    """Returns the loaded library; None if predictions run on scipy.

    Raises:
        UsageError: `DSR_TOOL_KERNELS` names kernels that are unknown, were not built, or do not run here.
    """
    return kernels().library


def level() -> str | None:
    """Returns the level of `library`: `avx512`, `avx2`, `baseline`, `neon` or `custom`; None for scipy."""
    return kernels().level


def kernels() -> Kernels:
    """Returns the loaded library, its level, and the problems on the way; found once for each value of the variable."""
    return _kernels(os.environ.get(VARIABLE, ""))


@functools.cache
def _kernels(wanted: str) -> Kernels:
    return choose(wanted, FOLDER)


def choose(wanted: str, folder: Path) -> Kernels:
    """Loads the fastest library in a folder, or the one that is asked for.

    Args:
        wanted: a value of `DSR_TOOL_KERNELS`; empty for the fastest.
        folder: folder of the libraries and of their record.

    Raises:
        UsageError: as for `library`.
    """
    built = tuple(name for name in LEVELS if _path(folder, name).is_file())
    if wanted == "none":
        return Kernels(None, None, built, ())
    if Path(wanted).suffix == SUFFIX:
        return _load_path(Path(wanted), built)
    runs = supported_levels()
    if wanted:
        _check_level(wanted, built)
    record, problems = _read_record(folder), list[str]()
    # The next slower library is better than none, so a damaged one is a problem to report and no error.
    for name in [wanted] if wanted else [name for name in built if name in runs]:
        loaded = _load(_path(folder, name), _recorded_sha256(record, name))
        if isinstance(loaded, ctypes.CDLL):
            return Kernels(loaded, name, built, tuple(problems))
        problems.append(loaded)
    if not built:
        problems.append(f"no kernels were built, so predictions run on scipy; have a C++ compiler and {_REMEDY}")
    return Kernels(None, None, built, tuple(problems))


def _load_path(path: Path, built: tuple[str, ...]) -> Kernels:
    loaded = _load(path, None)
    if isinstance(loaded, str):
        raise UsageError(f"{VARIABLE} {str(path)!r} cannot be used: {loaded}.")
    return Kernels(loaded, "custom", built, ())


def _check_level(wanted: str, built: tuple[str, ...]) -> None:
    """Raises `UsageError` unless the level is known, runs here and was built."""
    if wanted not in LEVELS:
        raise unknown_name(VARIABLE, wanted, ("none", *LEVELS))
    if wanted not in supported_levels() and wanted != "baseline":
        lacks = ", ".join(missing_features(wanted)) or "that instruction set"
        raise UsageError(
            f"{VARIABLE} {wanted!r} does not run on this processor, which lacks {lacks}; unset it for the fastest "
            f"kernels that do."
        )
    if wanted not in built:
        raise UsageError(f"{VARIABLE} {wanted!r} names kernels that were not built; {_REMEDY}, or unset it.")


def _load(path: Path, sha256: str | None) -> ctypes.CDLL | str:
    """Returns a loaded library, or a sentence without its full stop that says why it was refused.

    Args:
        path: path of the library.
        sha256: the digest that its bytes must have; None if there is no record of the build.
    """
    try:
        content = path.read_bytes()
        # The system maps a truncated library without complaint, and kills the process when it touches the missing part.
        if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
            return f"{path.name} is damaged, or is not the file that was built; {_REMEDY}"
        loaded = ctypes.CDLL(str(path))
        abi = loaded.dsr_kernels_abi()
    except OSError as error:
        return f"{path.name} cannot be loaded ({first_line(error)}); {_REMEDY}"
    except AttributeError:
        return f"{path.name} holds no kernels of this version; {_REMEDY}"
    # Checked before any other function is called; the layout of structs is checked when a library is used (Machine).
    if abi != ABI:
        return f"{path.name} has interface {abi}, and this version needs {ABI}; {_REMEDY}"
    return loaded


def _recorded_sha256(record: Mapping[str, object], name: str) -> str | None:
    """Returns the digest of a level in the record; None without a record, "" (no file has it) without an entry."""
    if not record:
        return None
    entry = record.get(name)
    digest = entry.get("sha256") if isinstance(entry, Mapping) else None
    return digest if isinstance(digest, str) else ""


def _read_record(folder: Path) -> Mapping[str, object]:
    """Returns the record of the build; empty if there is none, as for a library that somebody else has built."""
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _path(folder: Path, name: str) -> Path:
    return folder / f"_kernels_{name}{SUFFIX}"
