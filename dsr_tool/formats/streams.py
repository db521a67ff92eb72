"""The streams of one tensor, and the checks of them that all codecs share: streams come from untrusted files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dsr_tool.errors import FormatError
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import Array, SparseTensor

__all__ = ["Streams", "checked", "exact_streams", "require_bytes", "stream_bytes"]

Streams = dict[str, Array]
"""Arrays of one tensor by suffix."""


def stream_bytes(streams: Streams) -> int:
    """Returns the bytes of all streams of a tensor."""
    return sum(array.nbytes for array in streams.values())


def exact_streams(streams: Mapping[str, Array], *names: str) -> list[Array]:
    """Returns the streams of these names; raises `FormatError` if there are others, or one is missing."""
    if set(streams) != set(names):
        raise FormatError(f"streams {sorted(streams)} were found where {sorted(names)} were expected.")
    return [streams[name] for name in names]


def require_bytes(owner: str, *streams: Array) -> None:
    """Raises `FormatError` unless all streams of an owner, as in "a delta-coded parameter", are vectors of bytes."""
    if any(stream.dtype != np.uint8 or stream.ndim != 1 for stream in streams):
        raise FormatError(f"the streams of {owner} are not bytes; the file is damaged.")


def checked(mask: Mask, values: Array, active: int, dtype: np.dtype[Any]) -> SparseTensor:
    """Returns a decoded tensor; raises `FormatError` unless it has the count and dtype that the manifest lists."""
    if mask.active != active or values.shape != (active,) or values.dtype != dtype:
        raise FormatError(
            f"a parameter of {active} active {dtype} weights is stored with {mask.active} positions and "
            f"{values.shape} {values.dtype} values; the file is damaged."
        )
    return SparseTensor(mask, values)
