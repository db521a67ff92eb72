"""Writer of safetensors files that holds one array at a time; the bytes are those of the `safetensors` package."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsr_tool.sparsity.tensor import Array

__all__ = ["Planned", "write_arrays"]

_BYTES = {
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "C64": 8,
    "F32": 4,
    "U32": 4,
    "I32": 4,
    "BF16": 2,
    "F16": 2,
    "U16": 2,
    "I16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
"""Bytes per entry by type, in the order in which the package writes types; equal types are in the order of names."""
_ALIGNMENT = 8
"""The header ends at a multiple of so many bytes; it is filled with spaces."""


@dataclass(frozen=True)
class Planned:
    """An array that will be written.

    Attributes:
        name: its name in the file.
        kind: its type, one of the format's names, such as `F32`.
        shape: its shape.
        make: returns the array; only its bytes count, so that numpy need not know the type.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    make: Callable[[], Array]

    @property
    def nbytes(self) -> int:
        """Length of the array in bytes."""
        return math.prod(self.shape) * _BYTES[self.kind]


def write_arrays(path: Path, planned: Sequence[Planned]) -> None:
    """Writes arrays to a new safetensors file, each made when its turn comes.

    Args:
        path: the file.
        planned: the arrays, in any order; names are distinct.

    Raises:
        OSError: writing fails.
        ValueError: an array is not as long as it was planned.
    """
    order = list(_BYTES)
    ordered = sorted(planned, key=lambda each: (order.index(each.kind), each.name.encode()))
    header, end = dict[str, object](), 0
    for each in ordered:
        offsets = [end, end + each.nbytes]
        header[each.name] = {"dtype": each.kind, "shape": list(each.shape), "data_offsets": offsets}
        end += each.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for each in ordered:
            data = np.ascontiguousarray(each.make()).reshape(-1).view(np.uint8)
            if data.nbytes != each.nbytes:
                raise ValueError(f"{each.name!r} has {data.nbytes:,} bytes, expected {each.nbytes:,}")
            file.write(data.data)
