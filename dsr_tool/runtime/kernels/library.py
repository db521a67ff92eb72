"""The shared library of the kernels: found, checked and loaded once.

`DSR_TOOL_KERNELS` chooses another than the fastest that runs here: `none` for scipy, a level (`baseline`, `avx2`,
`avx512`, `neon`), or the path of a library, as for one that was built with sanitizers.
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
from typing import Any

from dsr_tool.errors import UsageError, first_line, unknown_name
from dsr_tool.runtime.kernels.cpu import LEVELS, missing_features, supported_levels
from dsr_tool.runtime.kernels.ops import ABI

__all__ = ["ABI", "VARIABLE", "Kernels", "choose", "kernels", "level", "library"]

VARIABLE = "DSR_TOOL_KERNELS"

_FOLDER = Path(__file__).parent
_RECORD = "_kernels.json"
_SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
_REMEDY = "install dsr-tool again, or run `make kernels` in a checkout"


@dataclass(frozen=True)
class Kernels:
    """What was found.

    Attributes:
        library: the loaded library; None for scipy.
        level: of that library, or `custom` for one given by its path.
        built: levels whose library is there, fastest first.
        problems: a sentence for each library that should have been loaded and was not.
    """

    library: ctypes.CDLL | None
    level: str | None
    built: tuple[str, ...]
    problems: tuple[str, ...]


def library() -> ctypes.CDLL | None:
    """The kernels that run here; None where predictions run on scipy.

    Raises:
        UsageError: the environment asks for kernels that are unknown, are not there, or do not run here.
    """
    return kernels().library


def level() -> str | None:
    """Which kernels `library` has: `avx512`, `avx2`, `baseline`, `neon`, `custom`; None for scipy."""
    return kernels().level


def kernels() -> Kernels:
    """What was found and loaded, and what did not go well."""
    return _kernels(os.environ.get(VARIABLE, ""))


@functools.cache
def _kernels(wanted: str) -> Kernels:
    return choose(wanted, _FOLDER)


def choose(wanted: str, folder: Path) -> Kernels:
    """Load the fastest library in a folder, or the one that is wanted.

    Args:
        wanted: a value of `DSR_TOOL_KERNELS`; empty for the fastest.
        folder: of the libraries and their record.

    Raises:
        UsageError: as for `library`.
    """
    built = tuple(name for name in LEVELS if _path(folder, name).is_file())
    if wanted == "none":
        return Kernels(None, None, built, ())
    if Path(wanted).suffix == _SUFFIX:
        return _given(Path(wanted), built)
    runs = supported_levels()
    if wanted:
        _require(wanted, built)
    record, problems = _record(folder), list[str]()
    for name in [wanted] if wanted else [name for name in built if name in runs]:
        loaded = _load(_path(folder, name), record.get(name, {}) if record else None)
        if isinstance(loaded, ctypes.CDLL):
            return Kernels(loaded, name, built, tuple(problems))
        problems.append(loaded)
    if not built:
        problems.append(f"no kernels were built, so predictions run on scipy; have a C++ compiler and {_REMEDY}")
    return Kernels(None, None, built, tuple(problems))


def _given(path: Path, built: tuple[str, ...]) -> Kernels:
    loaded = _load(path, None)
    if isinstance(loaded, str):
        raise UsageError(f"{VARIABLE} {str(path)!r} cannot be used: {loaded}.")
    return Kernels(loaded, "custom", built, ())


def _require(wanted: str, built: tuple[str, ...]) -> None:
    """Raise unless the level is known, runs here and is there."""
    if wanted not in LEVELS:
        raise unknown_name(VARIABLE, wanted, ("none", *LEVELS))
    if wanted not in supported_levels() and wanted != "baseline":
        lacks = ", ".join(missing_features(wanted)) or "that instruction set"
        raise UsageError(
            f"{VARIABLE} {wanted!r} does not run on this processor, which lacks {lacks}; leave it out for the fastest "
            f"kernels that do."
        )
    if wanted not in built:
        raise UsageError(f"{VARIABLE} {wanted!r} names kernels that were not built; {_REMEDY}, or leave it out.")


def _load(path: Path, entry: Any) -> ctypes.CDLL | str:
    """Load a library, or say in a sentence without its full stop why not.

    Args:
        path: of the library.
        entry: what the record of the build says of it; None where there is no record.
    """
    try:
        content = path.read_bytes()
        # The system maps a library that was cut off and stops the process when it touches what is missing.
        if entry is not None and hashlib.sha256(content).hexdigest() != _sha256(entry):
            return f"{path.name} is damaged, or is not what was built; {_REMEDY}"
        loaded = ctypes.CDLL(str(path))
        abi = loaded.dsr_kernels_abi()
    except OSError as error:
        return f"{path.name} cannot be loaded ({first_line(error)}); {_REMEDY}"
    except AttributeError:
        return f"{path.name} holds no kernels of this version; {_REMEDY}"
    if abi != ABI:
        return f"{path.name} has interface {abi}, and this version needs {ABI}; {_REMEDY}"
    return loaded


def _sha256(entry: Any) -> Any:
    return entry.get("sha256") if isinstance(entry, Mapping) else None


def _record(folder: Path) -> Mapping[str, Any]:
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _path(folder: Path, name: str) -> Path:
    return folder / f"_kernels_{name}{_SUFFIX}"
