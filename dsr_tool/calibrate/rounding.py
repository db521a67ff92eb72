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
from dsr_tool.sparse.flow import storage
from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparsity.grid import GridTensor, best_scales, on_grid
from dsr_tool.sparsity.tensor import SparseTensor

__all__ = ["round_to_grids"]

_Found = Callable[[GridTensor], None]


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
    # A copy with weights of its own, since they change; tied ones stay tied.
    network = copy.deepcopy(frozen_copy(model.module))
    tensors = model.tensors()
    names = [name for name, spec in model.specs.items() if spec.weight]
    for name in names:
        if not np.isfinite(tensors[name].values).all():
            raise UsageError(
                f"weight {name!r} has values that are not finite numbers, which no grid holds; mend the model first."
            )
    # Layers that share a weight share its codes, whatever name the run sees.
    places = {name: storage(network.get_parameter(name)) for name in names}
    exact = {places[name]: tensors[name] for name in names}
    found: dict[int, GridTensor] = {}

    def fitting(module: nn.Module, layer: Layer) -> Fitting:
        place = storage(module.get_parameter(layer.name))
        return _Rounding(module, layer, exact[place], bits, lambda rounded: found.update({place: rounded}))

    reconstruct(tensor_form(network), {}, pictures, seed=seed, on_progress=on_progress, fitting=fitting)
    return {name: found[place] for name, place in places.items() if place in found}


class _Rounding(Fitting):
    """One layer whose values are to lie on a grid; its mask, bias and norm stay as they are."""

    def __init__(self, module: nn.Module, layer: Layer, exact: SparseTensor, bits: int, found: _Found) -> None:
        """Takes the layer's exact weight, and who receives the rounded one."""
        super().__init__(module, layer)
        self._exact, self._bits, self._found = exact, bits, found

    def fit(self, count: int, unit: int) -> Fitted:  # noqa: ARG002 - masks stay
        """Chooses codes and scales.

        Columns of a packed or a transposed layer may share a scale, or rows have several; such scales are chosen by
        weights alone. The sums become means in place, so this is done once.
        """
        rounded = on_grid(self._exact, self._bits) or self._fitted()
        self._found(rounded)
        value = torch.from_numpy(rounded.to_dense())
        return Fitted(torch.ones_like(value, dtype=torch.bool), {self.layer.name: value}, 0.0)

    def _fitted(self) -> GridTensor:
        xx, tx, x, _, _ = self._means(centred=False)
        if self._bias[0]:
            # Slices of a layer have equal shares of its bias.
            bias = self._old_bias(0, len(xx) // self._slices)[:, 0].repeat_interleave(self._slices, 0)
            tx.baddbmm_(bias[:, :, None], x[:, None, :], alpha=-1 / self._slices)
        shape = self._exact.mask.shape
        scales = torch.from_numpy(best_scales(self._exact, self._bits)).reshape(-1, *[1] * (len(shape) - 1))
        active = torch.from_numpy(self._exact.mask.to_bool()).float()
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
        codes = self._tensor(fit_codes(grid))
        if own:
            scales = self._tensor(grid.scales.expand_as(weight).contiguous()).flatten(1)[:, 0]
        kept = SparseTensor.from_dense(codes.numpy().astype(np.int8), self._exact.mask)
        return GridTensor(kept.mask, kept.values, scales.reshape(-1).numpy().copy())
