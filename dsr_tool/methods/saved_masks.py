"""Masks in the state of an attached method, packed as bits, so that a loop of one's own can resume."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dsr_tool.errors import FormatError, UsageError
from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparsity.mask import Mask

__all__ = ["packed_masks", "unpacked_masks"]


def packed_masks(model: SparseModel) -> dict[str, torch.Tensor]:
    """Returns the masks of all sparse weights as bits: uint8, shape (ceil(weights / 8),) each, in row-major order."""
    names = model.sizes
    return {name: torch.from_numpy(model.mask_of(name, model.specs[name].shape).bits.copy()) for name in names}


def unpacked_masks(model: SparseModel, packed: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns a boolean tensor on the CPU for each sparse weight.

    Raises:
        UsageError: the masks are those of another model.
    """
    if packed.keys() != model.sizes.keys():
        other = min(packed.keys() ^ model.sizes.keys())
        raise UsageError(f"the state is from another model: {other!r} is a sparse weight in only one of the two.")
    masks = {}
    for name, bits in packed.items():
        try:
            mask = Mask.from_bits(bits.cpu().numpy(), model.specs[name].shape)
        except FormatError as error:
            raise UsageError(f"the state is from another model: its mask of {name!r} does not fit ({error})") from error
        masks[name] = torch.from_numpy(mask.to_bool())
    return masks
