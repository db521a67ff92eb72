"""Exploration: counts the weights that were ever active while a training runs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from dsr_tool.errors import FormatError
from dsr_tool.sparse.model import SparseModel

__all__ = ["Exploration"]


class Exploration:
    """The union of all masks that a model has had, one boolean per sparse weight, on the model's device.

    A step in which no mask changes costs one comparison of a counter per layer.
    """

    def __init__(self, model: SparseModel, bits: Mapping[str, torch.Tensor] | None = None) -> None:
        """Starts with the current masks.

        Args:
            model: the model, on its device.
            bits: what `bits` returned in an earlier part of the same training.

        Raises:
            FormatError: `bits` are from another model.
        """
        self._model = model
        # Clones, since methods change masks in place.
        self._ever = {name: mask.clone() for name, mask in model.masks.items()}
        self._seen = {name: self._version(name) for name in model.masks}
        for name, packed in (bits or {}).items():
            size = self._ever[name].numel() if name in self._ever else -1
            if packed.dtype != torch.uint8 or packed.shape != (-(-size // 8),):
                raise FormatError(
                    f"the checkpoint's record of active weights does not fit {name!r} of this model; train again from "
                    f"the converted model."
                )
            unpacked = torch.from_numpy(np.unpackbits(packed.cpu().numpy(), count=size).astype(np.bool_))
            ever = self._ever[name]
            ever |= unpacked.view(ever.shape).to(ever.device)

    def look(self) -> None:
        """Adds the masks that were changed or replaced since the last call."""
        for name, mask in self._model.masks.items():
            if (version := self._version(name)) != self._seen[name]:
                self._seen[name] = version
                self._ever[name] |= mask

    def counts(self) -> dict[str, int]:
        """Returns the number of weights of each layer that were ever active, in one transfer to the host."""
        if not self._ever:
            return {}
        counts: list[int] = torch.stack([ever.count_nonzero() for ever in self._ever.values()]).tolist()
        return dict(zip(self._ever, counts, strict=True))

    def bits(self) -> dict[str, torch.Tensor]:
        """Returns the union of all masks as packed bits: uint8, shape (ceil(weights / 8),) each."""
        return {
            name: torch.from_numpy(np.packbits(ever.cpu().numpy().reshape(-1))) for name, ever in self._ever.items()
        }

    def _version(self, name: str) -> tuple[int, int]:
        """Returns a pair that changes whenever the mask does: the tensor's id, and torch's count of writes to it."""
        mask = self._model.masks[name]
        return id(mask), mask._version
