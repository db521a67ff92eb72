"""Rounds the weights of a whole network to grids, layer by layer, so that the outputs stay.

Each layer is rounded for the inputs that it gets in the network that is rounded so far, towards what it wrote in the
exact one, so that later layers repair what earlier ones changed. Biases and norms stay as they are: moments are not
centred, so the means of outputs are kept as well as what varies.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from dsr_tool.calibrate.codes import GridProblem, fit_codes
from dsr_tool.calibrate.fitting import Fitted, Fitting
from dsr_tool.calibrate.reconstruct import reconstruct
from dsr_tool.calibrate.solver import Problem
from dsr_tool.calibrate.survey import Layer
from dsr_tool.errors import UsageError
from dsr_tool.sparse.capture import frozen_copy
from dsr_tool.sparse.feeding import tensor_form
from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparsity.granularity import Granularity
from dsr_tool.sparsity.grid import GridTensor
from dsr_tool.sparsity.grid_rounding import best_scales, on_grid
from dsr_tool.sparsity.tensor import SparseTensor

__all__ = ["round_to_grids"]


def round_to_grids(
    model: SparseModel,
    bits: int,
    pictures: torch.Tensor,
    *,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, GridTensor]:
    """Rounds the weights of a model to grids; the model itself stays as it is.

    Weights that lie on such a grid already keep every bit.

    Args:
        model: the model, with weights in float32.
        bits: bits of a code, 2 to 8.
        pictures: inputs, shape (pictures, *input_shape), float32.
        seed: seed of the choice of positions that are looked at.
        on_progress: receives the number of layers that are done, and of all.

    Returns:
        Every weight that the pictures reach, by name, under the mask that it had.

    Raises:
        CheckFailed: the inputs of a layer contain NaN or inf.
        UsageError: the module does not take the pictures, or a weight is not finite.
    """
    weights = {name: tensor for name, tensor in model.tensors().items() if model.specs[name].weight}
    for name, tensor in weights.items():
        if not np.isfinite(tensor.values).all():
            raise UsageError(
                f"weight {name!r} has values that are not finite numbers, which no grid holds; replace them first."
            )
    found: dict[str, GridTensor] = {}

    def fitting(module: nn.Module, layer: Layer) -> Fitting:
        return _Rounding(module, layer, weights.get(layer.name), bits, found)

    # A copy with weights of its own, since they change.
    network = tensor_form(copy.deepcopy(frozen_copy(model.module)))
    reconstruct(network, {}, pictures, seed=seed, on_progress=on_progress, fitting=fitting)
    return found


class _Rounding(Fitting):
    """One layer whose values are to lie on a grid; its mask, bias and norm stay as they are."""

    def __init__(
        self, module: nn.Module, layer: Layer, exact: SparseTensor | None, bits: int, found: dict[str, GridTensor]
    ) -> None:
        """Takes the layer's exact weight, None if it is no weight of the model, and where the rounded one goes."""
        super().__init__(module, layer)
        self._exact, self._bits, self._found = exact, bits, found

    def fit(self, count: int, granularity: Granularity) -> Fitted:  # noqa: ARG002 - masks stay
        """Chooses codes and scales.

        Columns of a packed or a transposed layer may share a scale, or rows have several; such scales are chosen by
        weights alone. The sums become means in place, so this is done once.
        """
        name = self.layer.name
        mask = torch.ones_like(self._state[name], dtype=torch.bool)
        # Any parameter may be a factor of a product; those that no export rounds stay.
        if self._exact is None:
            return Fitted(mask, {}, 0.0)
        self._found[name] = on_grid(self._exact, self._bits) or self._fitted(self._exact)
        return Fitted(mask, {name: torch.from_numpy(self._found[name].to_dense())}, 0.0)

    def _fitted(self, exact: SparseTensor) -> GridTensor:
        xx, tx, x, _, _ = self._means(centred=False)
        if self._bias[0]:
            # Slices of a layer have equal shares of its bias.
            bias = self._old_bias(0, len(xx) // self._slices)[:, 0].repeat_interleave(self._slices, 0)
            tx.baddbmm_(bias[:, :, None], x[:, None, :], alpha=-1 / self._slices)
        shape = exact.mask.shape
        scales = torch.from_numpy(best_scales(exact, self._bits)).reshape(-1, *[1] * (len(shape) - 1))
        active = torch.from_numpy(exact.mask.to_bool()).float()
        of_entries = self._matrices(scales.expand(shape).contiguous())
        # Codes of one row share its scale, unless the first dimension of the weight is that of the inputs.
        own = self._slices == 1 and not type(self._owner).__name__.startswith("ConvTranspose")
        weight, ones = self._weight, torch.ones(self._weight.shape[:2])
        grid = GridProblem(
            Problem(weight, xx, tx, ones, self.sums.count),
            self._matrices(active),
            of_entries[..., :1].clone() if own else of_entries,
            self._bits,
        )
        # Slices one after another, so that the temporary arrays are those of one.
        parts = [grid] if self._slices == 1 else grid.blocks()
        codes = self._tensor(torch.cat([fit_codes(part) for part in parts]))
        if own:
            scales = self._tensor(grid.scales.expand_as(weight).contiguous()).flatten(1)[:, 0]
        kept = SparseTensor.from_dense(codes.numpy().astype(np.int8), exact.mask)
        return GridTensor(kept.mask, kept.values, scales.reshape(-1).numpy().copy())
