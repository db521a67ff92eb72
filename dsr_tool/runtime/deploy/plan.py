"""A plan file that is run by the library for C programs, from Python: what a C program would get."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dsr_tool.errors import FormatError, UsageError
from dsr_tool.files import require_file
from dsr_tool.runtime.deploy.library import load
from dsr_tool.sparsity.tensor import Array

__all__ = ["PlanFile", "PlanValue"]

_MAX_RANK, _FLOAT32 = 8, 1


class PlanValue(NamedTuple):
    """An input or output of a plan.

    Attributes:
        name: its name in the model.
        shape: its shape, the batch first.
    """

    name: str
    shape: tuple[int, ...]


class _Tensor(ctypes.Structure):
    """The struct dsr_tensor of dsr.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("shape", ctypes.c_int64 * _MAX_RANK),
        ("strides", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
    )


class PlanFile:
    """An open plan file.

    Threads may share it; their runs follow each other. A forked process may go on with it.

    Attributes:
        inputs: what `run` takes.
        outputs: what `run` returns.
    """

    def __init__(self, source: str | Path | bytes, threads: int = 1) -> None:
        """Reads and checks a plan.

        Args:
            source: path of the file, or its bytes.
            threads: number of threads that share the work of one run.

        Raises:
            FileError: there is no such file.
            FormatError: the plan is damaged, or for another processor or version; the message says which.
            UsageError: the library was not built.
        """
        self._library, self._handle = _declared(load()), None
        if isinstance(source, bytes):
            self._handle = self._library.dsr_open_memory(source, len(source), threads)
        else:
            require_file(Path(source), "plan")
            self._handle = self._library.dsr_open(os.fsencode(source), threads)
        if not self._handle:
            raise FormatError(self._error())
        self.inputs = self._values("input")
        self.outputs = self._values("output")

    def text(self, name: str) -> str | None:
        """Returns a text of the plan, as `dsr_text` in dsr.h describes; None if it has none of that name."""
        found: bytes | None = self._library.dsr_text(self._handle, name.encode())
        return None if found is None else found.decode(errors="replace")

    def run(self, x: Array) -> dict[str, Array]:
        """Computes the outputs for one batch.

        Args:
            x: float32 of the shape of the input; arrays in another order are copied.

        Returns:
            Every output by name, in the order of the plan.

        Raises:
            UsageError: an array of another type or shape.
        """
        x = np.asarray(x)
        if x.dtype != np.float32:
            raise UsageError(f"input of type {x.dtype} does not fit; a plan takes float32, so convert it with astype.")
        if x.ndim > _MAX_RANK:
            raise UsageError(f"input of {x.ndim} axes does not fit; the plan expects {self.inputs[0].shape}.")
        outputs = {name: np.empty(shape, np.float32) for name, shape in self.outputs}
        given = (_Tensor * 1)(_tensor(np.ascontiguousarray(x)))
        wanted = (_Tensor * len(outputs))(*map(_tensor, outputs.values()))
        if self._library.dsr_run(self._handle, given, 1, wanted, len(outputs)):
            raise UsageError(self._error())
        return outputs

    def close(self) -> None:
        """Frees the plan; a second call does nothing."""
        handle = ctypes.c_void_p(self._handle)
        self._library.dsr_close(ctypes.byref(handle))
        self._handle = None

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.close()

    def _error(self) -> str:
        message: bytes = self._library.dsr_last_error()
        return message.decode(errors="replace")

    def _values(self, kind: str) -> tuple[PlanValue, ...]:
        count = getattr(self._library, f"dsr_{kind}_count")(self._handle)
        found = [getattr(self._library, f"dsr_{kind}")(self._handle, index) for index in range(count)]
        return tuple(PlanValue(one.name.decode(errors="replace"), tuple(one.shape[: one.rank])) for one in found)


def _tensor(array: Array) -> _Tensor:
    shape = (ctypes.c_int64 * _MAX_RANK)(*array.shape)
    return _Tensor(array.ctypes.data, _FLOAT32, array.ndim, shape, None, None)


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """Tells ctypes the arguments and results of the library's functions."""
    pointer, number, text = ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p
    tensors = ctypes.POINTER(_Tensor)
    signatures: Mapping[str, tuple[type | None, tuple[type, ...]]] = {
        "dsr_open": (pointer, (text, number)),
        "dsr_open_memory": (pointer, (text, ctypes.c_size_t, number)),
        "dsr_input_count": (number, (pointer,)),
        "dsr_output_count": (number, (pointer,)),
        "dsr_input": (_Tensor, (pointer, number)),
        "dsr_output": (_Tensor, (pointer, number)),
        "dsr_text": (text, (pointer, text)),
        "dsr_run": (number, (pointer, tensors, number, tensors, number)),
        "dsr_close": (None, (ctypes.POINTER(pointer),)),
        "dsr_last_error": (text, ()),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
