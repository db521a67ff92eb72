"""The library for C programs: where it lies, which levels it holds, and its functions for Python."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import NamedTuple

from dsr_tool.errors import UsageError
from dsr_tool.runtime.kernels.library import FOLDER, SUFFIX, VARIABLE

__all__ = ["LevelRow", "include_dir", "level_rows", "library", "load", "ort_library"]


def include_dir() -> Path:
    """Returns the folder of `dsr.h`, for the compiler's option `-I`."""
    return Path(__file__).parent / "include"


def library() -> Path:
    """Returns the path of the library for C programs: one file that holds all levels of this kind of machine.

    Raises:
        UsageError: it was not built.
    """
    # A level that is named by its path, as one with sanitizers, has the library of its build beside it.
    chosen = os.environ.get(VARIABLE, "")
    folder = Path(chosen).parent if Path(chosen).suffix == SUFFIX else FOLDER
    path = folder / f"libdsr{SUFFIX}"
    if not path.is_file():
        raise UsageError(
            f"the library for C programs was not built: there is no {str(path)!r}; install dsr-tool where a C++ "
            f"compiler is, or run `make kernels` in a checkout."
        )
    return path


def ort_library() -> Path:
    """Returns the path of the library that ONNX Runtime registers for files of `--encoding native`.

    It is `library`, which exports what ONNX Runtime looks for as well.

    Raises:
        UsageError: it was not built.
    """
    return library()


class LevelRow(NamedTuple):
    """One level of kernels in the library.

    Attributes:
        name: `avx512`, `avx2`, `neon` or `baseline`.
        lanes: floats in a vector.
        widest_tile: most output vectors that sparse weights hold in registers.
        widest_dense_tile: the same of weights with their zeros.
        runs: True if this processor runs it.
    """

    name: str
    lanes: int
    widest_tile: int
    widest_dense_tile: int
    runs: bool


class _Level(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("lanes", ctypes.c_int32),
        ("widest_tile", ctypes.c_int32),
        ("widest_dense_tile", ctypes.c_int32),
    )


def load() -> ctypes.CDLL:
    """Returns the loaded library.

    Raises:
        UsageError: it was not built, or cannot be loaded here.
    """
    return _load(library())


@functools.cache
def _load(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise UsageError(f"{str(path)!r} cannot be loaded ({error}); install dsr-tool again.") from error


def level_rows() -> tuple[LevelRow, ...]:
    """Returns the levels that the library holds, fastest first.

    Raises:
        UsageError: it was not built, or cannot be loaded here.
    """
    ask = load().dsr_level
    ask.restype, ask.argtypes = ctypes.POINTER(_Level), (ctypes.c_int32, ctypes.POINTER(ctypes.c_int32))
    rows: list[LevelRow] = []
    runs = ctypes.c_int32()
    while found := ask(len(rows), ctypes.byref(runs)):
        one = found[0]
        rows.append(LevelRow(one.name.decode(), one.lanes, one.widest_tile, one.widest_dense_tile, bool(runs.value)))
    return tuple(rows)
