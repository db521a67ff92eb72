"""Grids: weights in few bits, as a code for each active entry and a scale for each output channel.

`docs/format.md` describes every byte. The writer uses this codec for grid tensors alone, and for nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dsr_tool.errors import FormatError
from dsr_tool.formats.coding import decode_planes, decode_runs, encode_planes, encode_runs
from dsr_tool.formats.streams import Streams, checked, exact_streams, require_bytes
from dsr_tool.sparsity.grid import GridTensor, grid_fault
from dsr_tool.sparsity.layers import matrix_shape

__all__ = ["GRID", "decode_grid", "encode_grid"]

GRID = "grid"
"""Name of the codec in a manifest. It is no choice of `--encoding`: a tensor on a grid is stored like this."""

_BYTE = np.dtype(np.int8)
_FLOAT = np.dtype(np.float32)


def encode_grid(tensor: GridTensor) -> Streams:
    """Returns the runs of the mask, the planes of the codes, and the planes of the scales."""
    return {
        "mask": encode_runs(tensor.mask),
        "codes": encode_planes(tensor.codes),
        "scales": encode_planes(tensor.scales),
    }


def decode_grid(streams: Mapping[str, Any], shape: tuple[int, ...], active: int, dtype: np.dtype[Any]) -> GridTensor:
    """Returns the tensor of its streams, the inverse of `encode_grid`.

    Raises:
        FormatError: a code of -128, a scale that is negative, denormal or not finite or whose codes overflow, or a
            scale of zero in a channel that has codes.
    """
    runs, codes, scales = exact_streams(streams, "mask", "codes", "scales")
    require_bytes("a parameter on a grid", runs, codes, scales)
    if dtype != _FLOAT:
        raise FormatError(f"a parameter on a grid has type {dtype}, not float32; the file is damaged.")
    mask = decode_runs(runs, shape, active)
    tensor = GridTensor(
        mask, decode_planes(codes, active, _BYTE), decode_planes(scales, matrix_shape(shape)[0], _FLOAT)
    )
    if fault := grid_fault(tensor):
        raise FormatError(f"{fault}; the file is damaged.")
    checked(mask, tensor.codes, active, _BYTE)
    return tensor
