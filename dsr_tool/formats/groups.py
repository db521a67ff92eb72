"""Masks N:M in few bits: which N of M places are active, as one number per group, many groups to a word of 64 bits.

A group takes log2 C(M, N) bits and a little more: 2.67 for 2:4, where a bitmask takes 4. `docs/format.md` describes
every byte.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from dsr_tool.errors import FormatError
from dsr_tool.formats.coding import decode_planes, encode_planes
from dsr_tool.formats.streams import Streams, checked, exact_streams, require_bytes
from dsr_tool.sparsity.granularity import MOST_GROUP, Blocks, Granularity
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.pattern import found_groups
from dsr_tool.sparsity.tensor import Array, SparseTensor

__all__ = ["decode_groups", "decode_nm", "encode_groups", "encode_nm", "groups_bytes", "is_nm"]

_WORD = np.dtype("<u8")
_CHUNK = 1 << 18
"""Groups that are coded together: a few MiB of whole numbers, however large the layer."""


def is_nm(tensor: SparseTensor) -> bool:
    """Returns whether the mask of a tensor is N:M for some N and M, so that `encode_nm` takes it."""
    return found_groups(tensor.mask) is not None


def encode_nm(tensor: SparseTensor) -> Streams:
    """Returns the groups of the mask, and the planes of the values.

    Args:
        tensor: a tensor for which `is_nm` holds.
    """
    pattern = found_groups(tensor.mask)
    if pattern is None:
        raise ValueError("only masks N:M have groups; ask is_nm first.")
    return {"mask": encode_groups(tensor.mask, pattern), "values": encode_planes(tensor.values)}


def decode_nm(streams: Mapping[str, Array], shape: tuple[int, ...], active: int, dtype: np.dtype[Any]) -> SparseTensor:
    """Returns the tensor of its streams, the inverse of `encode_nm`.

    Raises:
        FormatError: the streams are not those of a tensor with this shape and count.
    """
    coded, planes = exact_streams(streams, "mask", "values")
    require_bytes("an N:M parameter", coded, planes)
    return checked(decode_groups(coded, shape, active), decode_planes(planes, active, dtype), active, dtype)


def groups_bytes(mask: Mask, pattern: Granularity) -> int:
    """Returns the bytes of `encode_groups`."""
    return 2 + 8 * -(-mask.size // pattern.group // _per_word(math.comb(pattern.group, pattern.kept)))


def encode_groups(mask: Mask, pattern: Granularity) -> npt.NDArray[np.uint8]:
    """Returns N, M and the words of a mask N:M.

    The number of a group with the active places p_1 < p_2 < ... is the sum of C(p_j, j), the rank of that choice among
    all. A word has as many groups as fit, the first as its lowest digit in base C(M, N).

    Args:
        mask: the mask.
        pattern: the N:M that it has.
    """
    kept, group = pattern.kept, pattern.group
    blocks, binomials, choices = Blocks.of(mask.shape, group), _binomials(group, kept), math.comb(group, kept)
    rows, digits = blocks.split(mask.to_bool()), _per_word(choices)
    padded = np.zeros(-(-blocks.count // digits) * digits, _WORD)
    for start in range(0, blocks.count, _CHUNK):
        places = np.nonzero(rows[start : start + _CHUNK])[1].reshape(-1, kept)
        padded[start : start + len(places)] = binomials[places, np.arange(1, kept + 1)].sum(axis=1)
    words = np.zeros(len(padded) // digits, _WORD)
    for column in reversed(padded.reshape(-1, digits).T):
        words = words * _WORD.type(choices) + column
    return np.frombuffer(bytes((kept, group)) + words.tobytes(), np.uint8)


def decode_groups(coded: npt.NDArray[np.uint8], shape: tuple[int, ...], active: int) -> Mask:
    """Returns the mask of coded groups, the inverse of `encode_groups`.

    Raises:
        FormatError: the groups are not those of a mask of this shape with `active` entries.
    """
    kept, group = (int(byte) for byte in coded[:2]) if len(coded) > 1 else (0, 0)
    size = math.prod(shape)
    fits = 0 < kept < group <= MOST_GROUP and len(shape) > 1 and shape[1] % group == 0
    if not fits or not size or active * group != size * kept:
        raise FormatError(
            f"a mask {kept}:{group} cannot be that of {active} active entries of shape {shape}; the file is damaged."
        )
    blocks, choices = Blocks.of(shape, group), math.comb(group, kept)
    digits = _per_word(choices)
    if len(coded) != 2 + 8 * -(-blocks.count // digits):
        raise FormatError(f"a mask {kept}:{group} does not hold {blocks.count} groups; the file is damaged.")
    words = np.frombuffer(coded[2:].tobytes(), _WORD).copy()
    by_word = np.empty((len(words), digits), np.int64)
    for column in range(digits):
        words, by_word[:, column] = np.divmod(words, _WORD.type(choices))
    numbers = by_word.reshape(-1)
    # One encoding for a mask: nothing may be left of a word, and nothing may stand behind the last group.
    if words.any() or numbers[blocks.count :].any():
        raise FormatError(f"a word of a mask {kept}:{group} has more groups than it holds; the file is damaged.")
    rows = np.zeros((blocks.count, group), np.bool_)
    for start in range(0, blocks.count, _CHUNK):
        _mark(rows[start : start + _CHUNK], numbers[start : min(start + _CHUNK, blocks.count)], kept)
    return Mask.from_bool(blocks.join(rows).reshape(shape))


def _mark(rows: npt.NDArray[np.bool_], numbers: npt.NDArray[np.int64], kept: int) -> None:
    """Sets the active places of groups, shape (groups, M), by their numbers."""
    binomials, each = _binomials(rows.shape[1], kept), np.arange(len(numbers))
    for j in range(kept, 0, -1):
        # The largest place p_j with C(p_j, j) of at most what is left is the only one that leaves room for the others.
        place = np.searchsorted(binomials[:, j], numbers, side="right") - 1
        rows[each, place] = True
        numbers = numbers - binomials[place, j]


def _binomials(group: int, kept: int) -> npt.NDArray[np.int64]:
    """Returns C(p, j) for p below M and j up to N, shape (M, N + 1)."""
    return np.array([[math.comb(p, j) for j in range(kept + 1)] for p in range(group)], np.int64)


def _per_word(choices: int) -> int:
    """Returns how many numbers below `choices` fit into 64 bits."""
    digits = 64 // (choices - 1).bit_length()
    while choices ** (digits + 1) <= 1 << 64:
        digits += 1
    return digits
