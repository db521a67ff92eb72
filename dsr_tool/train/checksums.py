"""Checksums of tensors, computed on their device, by which processes find out that they hold different values."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.nn.functional import pad

__all__ = ["checksums"]

_WORD = 8
"""Bytes that are hashed together, as one int64."""
_CHUNK = 2**18
"""Words per chunk: 2 MiB, and as much again for its products, instead of both for the whole network."""
_CHAIN = 6364136223846793005
"""Odd factor between chunks, so that two chunks cannot change places unseen (Knuth's for 64-bit sequences)."""


@torch.no_grad()
def checksums(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Returns a checksum of each tensor's bits, int64, shape (tensors,), on the device of the tensors.

    A checksum is a sum of all words of 64 bits, each times an odd number of its own, modulo 2^64: it differs whenever
    a single word differs, and almost surely if several do. Order counts; shape, type and memory format do not.

    Args:
        tensors: tensors of any types, all on one device; one after the other is read, so they may be made on demand.
    """
    factors: torch.Tensor | None = None
    sums: list[torch.Tensor] = []
    for tensor in tensors:
        words = _words(tensor)
        if factors is None or factors.device != words.device:
            # Made on the CPU, whose generator gives the same numbers on all machines.
            drawn = torch.randint(-(2**62), 2**62, (_CHUNK,), generator=torch.Generator().manual_seed(0))
            factors = drawn.mul_(2).add_(1).to(words.device)
        total = torch.zeros((), dtype=torch.int64, device=words.device)
        for chunk in words.split(_CHUNK):
            total = total * _CHAIN + (chunk * factors[: len(chunk)]).sum()
        sums.append(total)
    return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.int64)


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the bits of a tensor in row-major order as int64, the last word filled up with zeros."""
    octets = tensor.detach().reshape(-1).view(torch.uint8)
    rest = -len(octets) % _WORD
    # A view cannot start within a word, as a slice of a longer vector may.
    if rest or octets.storage_offset() % _WORD:
        octets = pad(octets, (0, rest))
    return octets.view(torch.int64)
