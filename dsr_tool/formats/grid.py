"""Grids: weights in few bits, as a code for each active entry and a scale for each output channel.

`docs/format.md` describes every byte. The writer uses this codec for grid tensors alone, and for nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from dsr_tool.errors import FormatError
from dsr_tool.formats.coding import decode_planes, decode_runs, encode_planes, encode_runs
from dsr_tool.formats.groups import decode_groups, encode_groups, groups_bytes
from dsr_tool.formats.streams import Streams, checked, exact_streams, require_bytes
from dsr_tool.sparsity.grid import GridTensor, grid_fault
from dsr_tool.sparsity.layers import matrix_shape
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.pattern import found_groups

__all__ = ["GRIDS", "decode_grid", "encode_grid", "encode_smallest_grid"]

_BYTE = np.dtype(np.int8)
_FLOAT = np.dtype(np.float32)

DecodeMask = Callable[[npt.NDArray[np.uint8], tuple[int, ...], int], Mask]


def encode_grid(tensor: GridTensor) -> Streams:
    """Returns the runs of the mask, the planes of the codes, and the planes of the scales."""
    return {
        "mask": encode_runs(tensor.mask),
        "codes": encode_planes(tensor.codes),
        "scales": encode_planes(tensor.scales),
    }


def encode_smallest_grid(tensor: GridTensor) -> tuple[str, Streams]:
    """Returns the codec that needs the fewest bytes, and its streams: the mask as runs, or as groups if it is N:M."""
    streams = encode_grid(tensor)
    pattern = found_groups(tensor.mask)
    if pattern is None or groups_bytes(tensor.mask, pattern) >= streams["mask"].nbytes:
        return "grid", streams
    return "grid-nm", {**streams, "mask": encode_groups(tensor.mask, pattern)}


def decode_grid(
    streams: Mapping[str, Any],
    shape: tuple[int, ...],
    active: int,
    dtype: np.dtype[Any],
    decode_mask: DecodeMask = decode_runs,
) -> GridTensor:
    """Returns the tensor of its streams, the inverse of `encode_grid`.

    Args:
        streams: arrays by suffix.
        shape: shape of the parameter.
        active: number of active entries.
        dtype: type of its values.
        decode_mask: the inverse of the encoding of its mask.

    Raises:
        FormatError: a code of -128, a scale that is negative, denormal or not finite or whose codes overflow, or a
            scale of zero in a channel that has codes.
    """
    coded, codes, scales = exact_streams(streams, "mask", "codes", "scales")
    require_bytes("a parameter on a grid", coded, codes, scales)
    if dtype != _FLOAT:
        raise FormatError(f"a parameter on a grid has type {dtype}, not float32; the file is damaged.")
    mask = decode_mask(coded, shape, active)
    tensor = GridTensor(
        mask, decode_planes(codes, active, _BYTE), decode_planes(scales, matrix_shape(shape)[0], _FLOAT)
    )
    if fault := grid_fault(tensor):
        raise FormatError(f"{fault}; the file is damaged.")
    checked(mask, tensor.codes, active, _BYTE)
    return tensor


GRIDS: dict[str, Callable[..., GridTensor]] = {
    "grid": decode_grid,
    "grid-nm": partial(decode_grid, decode_mask=decode_groups),
}
"""Decoders by the names of codecs in a manifest, which code the mask as runs or as groups N:M. They are no choice of
`--encoding`: a tensor on a grid is stored by one of them."""
