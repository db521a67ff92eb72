"""SparseModel: a module, the role of each of its parameters, and which weights are active."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dsr_tool.errors import CheckFailed, FormatError, UsageError, unknown_name
from dsr_tool.sparse.compact.change import compacted, held_state, named_parameters, parameters_of
from dsr_tool.sparse.compact.marks import store_of
from dsr_tool.sparse.compact.modules import uninstall
from dsr_tool.sparse.compact.store import CompactStore
from dsr_tool.sparse.compact.views import PerLayer
from dsr_tool.sparse.contract import require_exportable, require_state
from dsr_tool.sparse.folder import save_folder
from dsr_tool.sparse.pattern import torn_layer
from dsr_tool.sparse.trust import outside
from dsr_tool.sparsity.config import ModelConfig
from dsr_tool.sparsity.granularity import Granularity
from dsr_tool.sparsity.layers import LayerSpec
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor

__all__ = ["STORAGES", "SparseModel"]

STORAGES: tuple[str, ...] = ("masked", "compact")
"""How sparse weights can be held: as dense tensors with exact zeros, or as values and positions."""


class SparseModel:
    """A module, the role of each of its parameters, and which of its weights are active.

    The module is the user's own, in one of two storages. *Masked*: its parameters keep their names and types, inactive
    weights are exact zeros, and the masks lie beside it, so optimizers, `torch.compile` and everybody else see an
    ordinary network. *Compact*: all sparse weights are one flat parameter of the active values
    (`sparse.compact.store`), so gradients, optimizer state and messages between processes have that length. The
    `state_dict` has the same names and bytes in both.

    Attributes:
        module: the network.
        specs: one `LayerSpec` per state_dict entry, by name.
        config: description of the model.
        averages: averaged copies of the network, which every method attached to this model moves along.
    """

    def __init__(
        self,
        module: nn.Module,
        specs: Mapping[str, LayerSpec],
        masks: Mapping[str, torch.Tensor],
        config: ModelConfig,
    ) -> None:
        """Holds the parts as they are; `check()` compares them.

        Args:
            module: the network; in compact storage it knows its masks itself.
            specs: one `LayerSpec` per state_dict entry, by name.
            masks: a boolean tensor for each sparse weight, by parameter name; True is active.
            config: description of the model.
        """
        self.module = module
        self.specs = dict(specs)
        self._masks = {} if store_of(module) else dict(masks)
        self.config = config
        self.averages: list[SparseModel] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module."""
        return self.module(*args, **kwargs)

    @property
    def store(self) -> CompactStore | None:
        """The values and positions of a model in compact storage; None in masked storage."""
        return store_of(self.module)

    @property
    def storage(self) -> str:
        """How sparse weights are held: `masked` or `compact`."""
        return "masked" if self.store is None else "compact"

    def to_storage(self, storage: str) -> SparseModel:
        """Changes how sparse weights are held, in place and exactly. Make the optimizer after this.

        Args:
            storage: `masked` or `compact`.

        Returns:
            The model itself.

        Raises:
            UsageError: there is no such storage, or compact storage cannot hold this model.
            CheckFailed: weights and masks disagree.
        """
        if storage not in STORAGES:
            raise unknown_name("storage", storage, STORAGES)
        if storage == "compact" and self.store is None:
            self.check()
            compacted(self.module, self._masks)
            self._masks = {}
        elif storage == "masked" and self.store is not None:
            masks = dict(self.masks)
            uninstall(self.module)
            self._masks = masks
        return self

    @property
    def masks(self) -> Mapping[str, torch.Tensor]:
        """A boolean tensor for each sparse weight by name, True where active; made on access in compact storage."""
        return self._masks if self.store is None else PerLayer(self.store, self.store.mask)

    @property
    def weights(self) -> Mapping[str, torch.Tensor]:
        """The dense sparse weights by name, in the order of `masks`: the parameters, or copies in compact storage."""
        if self.store is not None:
            store = self.store
            return PerLayer(store, lambda name: store.dense(name).detach())
        parameters = dict(self.module.named_parameters())
        return {name: parameters[name] for name in self._masks}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields every parameter by its name in the `state_dict`, for optimizers with settings by layer.

        In compact storage the parameter of a sparse weight is the vector of its active values, which follows what a
        method moves. Make an optimizer from all of these, or from `module.parameters()`.
        """
        return named_parameters(self.module)

    @property
    def trained(self) -> list[str]:
        """Names of the sparse weights that are not frozen (`requires_grad`); methods leave the others alone."""
        if self.store is not None:
            return self.store.trained if self.store.values.requires_grad else []
        return [name for name, weight in self.weights.items() if weight.requires_grad]

    @property
    def counts(self) -> dict[str, int]:
        """Number of active weights of each sparse layer, in one transfer to the host."""
        if self.store is not None:
            return {name: layer.count for name, layer in self.store.layers.items()}
        if not self._masks:
            return {}
        counts: list[int] = torch.stack([mask.count_nonzero() for mask in self._masks.values()]).tolist()
        return dict(zip(self._masks, counts, strict=True))

    @property
    def sizes(self) -> dict[str, int]:
        """Number of weights of each sparse layer, active or not."""
        if self.store is not None:
            return {name: layer.size for name, layer in self.store.layers.items()}
        return {name: mask.numel() for name, mask in self._masks.items()}

    @property
    def granularity(self) -> Granularity:
        """The granularity says which weights are active together, and which positions share a number of active ones.

        Raises:
            FormatError: the description of the model has another one.
        """
        granularity = self.config.conversion.get("granularity", "weight")
        try:
            return Granularity.parse(str(granularity))
        except UsageError as error:
            raise FormatError(
                f"the model's description claims granularity {granularity!r}; the file is damaged."
            ) from error

    @property
    def active_weights(self) -> int:
        """Number of active weights in all sparse layers."""
        return sum(self.counts.values())

    @property
    def prunable_weights(self) -> int:
        """Number of weights in all sparse layers, active or not."""
        return sum(self.sizes.values())

    @property
    def parameters(self) -> int:
        """Number of parameters of the whole model, zeros included."""
        return parameters_of(self.module)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros among the prunable weights."""
        return 1 - self.active_weights / self.prunable_weights if self.prunable_weights else 0.0

    @property
    def model_sparsity(self) -> float:
        """Fraction of zeros among all parameters of the model."""
        # Zeros in parameters that stay dense, such as biases at the start, do not count.
        return (self.prunable_weights - self.active_weights) / self.parameters if self.parameters else 0.0

    def to(self, *args: Any, **kwargs: Any) -> SparseModel:
        """Moves the module as `nn.Module.to` does, then the masks, in the memory format of their weights."""
        self.module.to(*args, **kwargs)
        self.align_masks()
        return self

    def align_masks(self) -> None:
        """Moves masks to the device and memory format of their weights, for a module that was moved by itself."""
        for name, weight in self.weights.items() if self.store is None else ():
            mask = self._masks[name]
            # Masks are read together with their weights element by element, which needs equal strides to be fast.
            if mask.shape == weight.shape and (mask.device != weight.device or mask.stride() != weight.stride()):
                self._masks[name] = torch.empty_like(weight, dtype=torch.bool).copy_(mask)

    @torch.no_grad()
    def apply_masks(self) -> None:
        """Sets every inactive weight to +0."""
        self.align_masks()
        for name, weight in self.weights.items() if self.store is None else ():
            weight.masked_fill_(~self.masks[name], 0.0)  # a product with the mask would keep NaN and -0

    @torch.no_grad()
    def check(self) -> None:
        """Checks the model before every save and export.

        Loading a dense state_dict into the module undoes its sparsity silently; in compact storage it cannot.

        Raises:
            CheckFailed: a mask does not fit its weight or does not have the pattern of the granularity, an inactive
                weight is not exactly zero, or the state_dict lacks an entry that the model was made with.
            UsageError: the state_dict has an entry that files cannot hold; see `require_state`.
        """
        require_state(self.module)
        self._check_entries()
        if self.store is None:
            self._check_masks()
        torn = torn_layer(self.masks, self.granularity)
        if torn is not None:
            raise CheckFailed(
                f"the mask of {torn!r} does not have the pattern of --granularity {self.granularity}, with which the "
                f"model was converted; convert it again, with that or with --granularity weight."
            )

    def _check_masks(self) -> None:
        """Raises `CheckFailed` if a mask does not fit its weight, or a weight is not zero outside its mask."""
        parameters = dict(self.module.named_parameters())
        self.align_masks()
        for name, mask in self.masks.items():
            if parameters[name].shape != mask.shape:
                found = tuple(parameters[name].shape)
                raise CheckFailed(
                    f"mask {name!r} of shape {tuple(mask.shape)} fits no weight; the model has shape {found}."
                )
            if count := int(outside(parameters[name], mask)):
                raise CheckFailed(
                    f"weight {name!r} has {count:,} non-zero values outside its mask; either dense weights were "
                    f"loaded over it (apply_masks() zeroes them), or its file is damaged."
                )

    def check_writable(self) -> None:
        """Checks the model as `check` does, and that nothing has come to its state_dict since the model was made.

        Raises:
            CheckFailed, UsageError: see `check`; or there is a new entry, of which no role is known.
        """
        self.check()
        new = next((name for name, *_ in held_state(self.module) if name not in self.specs), None)
        if new is not None:
            raise CheckFailed(f"the state_dict has a new entry {new!r}; convert the network as it is now.")

    def _check_entries(self) -> None:
        """Raises `CheckFailed` if the state_dict lacks entries that the model was made with."""
        held = {name: tuple(like.shape) for name, like, _ in held_state(self.module)}
        for name, spec in self.specs.items():
            if name not in held:
                there = next((other for other in held if other.endswith(f".{name}")), None)
                if there is None:
                    raise CheckFailed(f"the state_dict no longer has {name!r}; convert the network as it is now.")
                raise CheckFailed(
                    f"{name!r} is {there!r} in the state_dict now; set model.module to the network without the wrapper "
                    f"around it."
                )
            # Buffers and extra states may grow as a network runs.
            if spec.role == "buffer" and held[name] != spec.shape:
                self.specs[name] = replace(spec, shape=held[name])

    @torch.no_grad()
    def tensors(self) -> dict[str, SparseTensor]:
        """Returns every entry of the state_dict as numpy values under a mask, a full one for dense entries.

        Raises:
            UsageError: an entry has a type that files cannot hold.
        """
        tensors = {}
        for name, like, make in held_state(self.module):
            require_exportable(name, like.dtype)
            array = make().detach().cpu().contiguous().numpy()
            tensors[name] = SparseTensor.from_dense(array, self.mask_of(name, array.shape))
        return tensors

    def mask_of(self, name: str, shape: tuple[int, ...]) -> Mask:
        """Returns the mask of a state_dict entry of this shape, a full one for a dense entry."""
        if self.store is not None and name in self.store.layers:
            return Mask(shape, self.store.positions_of(name).cpu().numpy().astype(np.int64))
        if name not in self._masks:
            return Mask.full(shape)
        return Mask.from_bool(self._masks[name].cpu().contiguous().numpy())

    def save(self, folder: str | Path, *, force: bool = False) -> None:
        """Writes a model folder: plain weights, packed masks and a description.

        Args:
            folder: the new folder.
            force: whether to replace an existing model folder.

        Raises:
            CheckFailed: weights and masks disagree.
            FileError: the folder exists and may not be replaced, or writing fails.
        """
        save_folder(self, folder, force=force)
