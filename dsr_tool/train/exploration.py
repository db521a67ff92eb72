"""Exploration: which weights were ever active, counted while a training runs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from dsr_tool.errors import FormatError
from dsr_tool.sparse.model import SparseModel

__all__ = ["Exploration"]


class Exploration:
    """The union of all masks that a model has had, one boolean per sparse weight, on the model's device.

    A step in which no mask changes costs a look at a counter per layer.
    """

    def __init__(self, model: SparseModel, bits: Mapping[str, torch.Tensor] | None = None) -> None:
        """Begin with the masks of now.

        Args:
            model: the model, on its device.
            bits: what an earlier part of the same training explored, as `bits` gave it.

        Raises:
            FormatError: `bits` are those of another model.
        """
        self._model = model
        self._ever = {name: mask.clone() for name, mask in model.masks.items()}
        self._seen = {name: self._version(name) for name in model.masks}
        for name, packed in (bits or {}).items():
            size = self._ever[name].numel() if name in self._ever else -1
            if packed.dtype != torch.uint8 or packed.shape != (-(-size // 8),):
                raise FormatError(f"the record of weights that were ever active does not fit {name!r} of this model.")
            unpacked = torch.from_numpy(np.unpackbits(packed.cpu().numpy(), count=size).astype(np.bool_))
            ever = self._ever[name]
            ever |= unpacked.view(ever.shape).to(ever.device)

    def look(self) -> None:
        """Take in the masks that changed since the last look, or are other tensors now."""
        for name, mask in self._model.masks.items():
            if (version := self._version(name)) != self._seen[name]:
                self._seen[name] = version
                self._ever[name] |= mask

    def counts(self) -> dict[str, int]:
        """Weights of each layer that were ever active, with one trip to the host."""
        if not self._ever:
            return {}
        found: list[int] = torch.stack([ever.count_nonzero() for ever in self._ever.values()]).tolist()
        return dict(zip(self._ever, found, strict=True))

    def bits(self) -> dict[str, torch.Tensor]:
        """All of it, packed: uint8, shape (ceil(weights / 8),) each."""
        return {
            name: torch.from_numpy(np.packbits(ever.cpu().numpy().reshape(-1))) for name, ever in self._ever.items()
        }

    def _version(self, name: str) -> tuple[int, int]:
        """A pair that changes whenever the mask does: the tensor's identity, and torch's count of writes into it."""
        mask = self._model.masks[name]
        return id(mask), mask._version
