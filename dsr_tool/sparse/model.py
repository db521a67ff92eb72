"""SparseModel: a module, the role of each of its parameters, and which weights are active."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dsr_tool.errors import CheckFailed, FormatError, UsageError
from dsr_tool.sparse.folder import save_folder
from dsr_tool.sparsity.config import ModelConfig
from dsr_tool.sparsity.granularity import GRANULARITIES
from dsr_tool.sparsity.layers import LayerSpec
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor

__all__ = ["SparseModel"]


class SparseModel:
    """A plain module whose inactive weights are exact zeros, with the masks beside it.

    The module is the user's own: its parameters keep their names and types, so optimizers, `state_dict`,
    `torch.compile` and DistributedDataParallel see an ordinary network.

    Attributes:
        module: the network.
        specs: one `LayerSpec` per state_dict entry, by name.
        masks: a boolean tensor for each sparse weight, by parameter name, with the shape of the weight; True is active.
        config: description of the model.
    """

    def __init__(
        self,
        module: nn.Module,
        specs: Mapping[str, LayerSpec],
        masks: Mapping[str, torch.Tensor],
        config: ModelConfig,
    ) -> None:
        """Holds the parts as they are; `check()` compares them."""
        self.module = module
        self.specs = dict(specs)
        self.masks = dict(masks)
        self.config = config

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module."""
        return self.module(*args, **kwargs)

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The sparse weights by name, in the order of `masks`."""
        parameters = dict(self.module.named_parameters())
        return {name: parameters[name] for name in self.masks}

    @property
    def trained(self) -> list[str]:
        """Names of the sparse weights that are not frozen (`requires_grad`); methods leave the others alone."""
        return [name for name, weight in self.weights.items() if weight.requires_grad]

    @property
    def granularity(self) -> str:
        """Unit that is active or inactive as a whole: `weight` or `kernel`.

        Raises:
            FormatError: the description of the model has another one.
        """
        granularity = self.config.conversion.get("granularity", "weight")
        if granularity not in GRANULARITIES:
            raise FormatError(f"the model's description claims granularity {granularity!r}; the file is damaged.")
        return str(granularity)

    @property
    def active_weights(self) -> int:
        """Number of active weights in all sparse layers."""
        return sum(int(torch.count_nonzero(mask)) for mask in self.masks.values())

    @property
    def prunable_weights(self) -> int:
        """Number of weights in all sparse layers, active or not."""
        return sum(mask.numel() for mask in self.masks.values())

    @property
    def parameters(self) -> int:
        """Number of parameters of the whole model, zeros included."""
        return sum(parameter.numel() for parameter in self.module.parameters())

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
        for name, weight in self.weights.items():
            mask = self.masks[name]
            # Masks are read together with their weights element by element, which needs equal strides to be fast.
            if mask.shape == weight.shape and (mask.device != weight.device or mask.stride() != weight.stride()):
                self.masks[name] = torch.empty_like(weight, dtype=torch.bool).copy_(mask)

    @torch.no_grad()
    def apply_masks(self) -> None:
        """Sets every inactive weight to +0."""
        self.align_masks()
        for name, weight in self.weights.items():
            weight.masked_fill_(~self.masks[name], 0.0)  # a product with the mask would keep NaN and -0

    @torch.no_grad()
    def check(self) -> None:
        """Raises `CheckFailed` unless every mask fits its weight and every inactive weight is exactly zero.

        Loading a dense state_dict into the module undoes its sparsity silently, so this runs before every save and
        export.
        """
        parameters = dict(self.module.named_parameters())
        if self.masks.keys() <= parameters.keys():
            self.align_masks()
        for name, mask in self.masks.items():
            if name not in parameters or parameters[name].shape != mask.shape:
                found = f"shape {tuple(parameters[name].shape)}" if name in parameters else "no such parameter"
                raise CheckFailed(f"mask {name!r} of shape {tuple(mask.shape)} fits no weight; the model has {found}.")
            # count_nonzero counts NaN as well.
            outside = int(torch.count_nonzero(parameters[name].masked_fill(mask, 0.0)))
            if outside:
                raise CheckFailed(
                    f"weight {name!r} has {outside:,} non-zero values outside its mask; either dense weights were "
                    f"loaded over it (apply_masks() zeroes them), or its file is damaged."
                )

    @torch.no_grad()
    def tensors(self) -> dict[str, SparseTensor]:
        """Returns every entry of the state_dict as numpy values under a mask, a full one for dense entries.

        Raises:
            UsageError: an entry has a type that numpy lacks.
        """
        tensors = {}
        for name, value in self.module.state_dict().items():
            # numpy has no bfloat16, and no file format here has complex numbers.
            if value.dtype in (torch.bfloat16, torch.complex64, torch.complex128):
                raise UsageError(
                    f"{name!r} has type {value.dtype}, which files cannot hold; call model.to(torch.float32) first."
                )
            array = value.detach().cpu().contiguous().numpy()
            if name in self.masks:
                mask = Mask.from_bool(self.masks[name].cpu().contiguous().numpy())
            else:
                mask = Mask.full(array.shape)
            tensors[name] = SparseTensor.from_dense(array, mask)
        return tensors

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
