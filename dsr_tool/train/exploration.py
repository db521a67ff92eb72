"""Exploration: counts the weights that were ever active while a training runs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from dsr_tool.errors import FormatError
from dsr_tool.sparse.compact.store import CompactStore
from dsr_tool.sparse.model import SparseModel

__all__ = ["Exploration"]


class Exploration:
    """The union of all masks that a model has had.

    In masked storage it takes one byte per sparse weight, on the model's device, in compact storage one bit on the
    host. A step in which no mask changes costs one comparison of a counter per layer, or one in all.
    """

    def __init__(self, model: SparseModel, bits: Mapping[str, torch.Tensor] | None = None) -> None:
        """Starts with the current masks.

        Args:
            model: the model, on its device.
            bits: what `bits` returned in an earlier part of the same training.

        Raises:
            FormatError: `bits` are from another model.
        """
        self._union = _Bools(model) if model.store is None else _Bits(model.store)
        sizes = model.sizes
        for name, packed in (bits or {}).items():
            if packed.dtype != torch.uint8 or packed.shape != (-(-sizes.get(name, -1) // 8),):
                raise FormatError(
                    f"the checkpoint's record of active weights does not fit {name!r} of this model; train again from "
                    f"the converted model."
                )
            self._union.add(name, packed.cpu())

    def look(self) -> None:
        """Adds the masks that were changed or replaced since the last call."""
        self._union.look()

    def counts(self) -> dict[str, int]:
        """Returns the number of weights of each layer that were ever active, in one transfer to the host."""
        return self._union.counts()

    def bits(self) -> dict[str, torch.Tensor]:
        """Returns the union of all masks as packed bits: uint8, shape (ceil(weights / 8),) each."""
        return self._union.bits()


class _Bools:
    """The union as boolean tensors beside the masks, so that a device is not waited for."""

    def __init__(self, model: SparseModel) -> None:
        self._model = model
        # Clones, since methods change masks in place.
        self._ever = {name: mask.clone() for name, mask in model.masks.items()}
        self._seen = {name: self._version(name) for name in model.masks}

    def add(self, name: str, packed: torch.Tensor) -> None:
        ever = self._ever[name]
        unpacked = torch.from_numpy(np.unpackbits(packed.numpy(), count=ever.numel()).astype(np.bool_))
        ever |= unpacked.view(ever.shape).to(ever.device)

    def look(self) -> None:
        for name, mask in self._model.masks.items():
            if (version := self._version(name)) != self._seen[name]:
                self._seen[name] = version
                self._ever[name] |= mask

    def counts(self) -> dict[str, int]:
        if not self._ever:
            return {}
        counts: list[int] = torch.stack([ever.count_nonzero() for ever in self._ever.values()]).tolist()
        return dict(zip(self._ever, counts, strict=True))

    def bits(self) -> dict[str, torch.Tensor]:
        return {
            name: torch.from_numpy(np.packbits(ever.cpu().numpy().reshape(-1))) for name, ever in self._ever.items()
        }

    def _version(self, name: str) -> tuple[int, int]:
        """Returns a pair that changes whenever the mask does: the tensor's id, and torch's count of writes to it."""
        mask = self._model.masks[name]
        return id(mask), mask._version


class _Bits:
    """The union as packed bits, one layer of booleans at a time."""

    def __init__(self, store: CompactStore) -> None:
        self._store, self._seen = store, store.version
        self._ever = {name: self._packed(name) for name in store.layers}

    def _packed(self, name: str) -> torch.Tensor:
        return torch.from_numpy(np.packbits(self._store.mask(name).cpu().numpy().reshape(-1)))

    def add(self, name: str, packed: torch.Tensor) -> None:
        self._ever[name] |= packed

    def look(self) -> None:
        if self._store.version != self._seen:
            self._seen = self._store.version
            for name in self._ever:
                self.add(name, self._packed(name))

    def counts(self) -> dict[str, int]:
        return {name: int(np.unpackbits(ever.numpy()).sum(dtype=np.int64)) for name, ever in self._ever.items()}

    def bits(self) -> dict[str, torch.Tensor]:
        return {name: ever.clone() for name, ever in self._ever.items()}
