"""Training with weights in few bits: passes compute with rounded weights, and steps change the exact ones.

The straight-through estimator (Bengio, Leonard & Courville 2013, section 4): rounding has a derivative of zero almost
everywhere, so the gradient at the rounded weights is taken for that at the exact ones. Hence no layer needs to know:
weights are rounded in place before the forward pass, and are exact again after the backward pass, in either storage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch

from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparsity.grid import largest_code, row_counts
from dsr_tool.sparsity.grid_rounding import best_scales
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import SparseTensor

__all__ = ["RoundedWeights"]

_EVERY = 50
"""Passes for which the scales of the grids are kept, unless masks change. Choosing them takes as long as the rounding
itself some twenty times over, and weights move little in so few steps."""


class RoundedWeights:
    """The weights of a model, exact and on their grids.

    Every weight that an export would round is rounded: sparse and dense ones, trained and frozen. The scales are those
    of an export (`dsr_tool.sparsity.grid.best_scales`), so what was computed with is what a file holds.
    """

    def __init__(self, model: SparseModel, bits: int) -> None:
        """Rounds nothing yet.

        Args:
            model: the model, on its device and in the storage of the training.
            bits: bits of a code, see `dsr_tool.sparsity.grid`.
        """
        self._model, self._bits = model, bits
        self._steps: dict[str, torch.Tensor] = {}
        self._uses = 0
        self._exact: dict[str, torch.Tensor] | None = None

    def choose_again(self) -> None:
        """Has the scales chosen anew for the next pass, since masks changed or an epoch begins."""
        self._uses = 0

    @contextmanager
    def rounded(self) -> Iterator[None]:
        """Puts the weights on their grids inside, and back to their exact values after; it may be nested."""
        if self._exact is not None:
            yield
            return
        try:
            self._round()
            yield
        finally:
            self.load_state(self.state())
            self._exact = None

    def settle(self) -> None:
        """Leaves the weights on their grids for good."""
        self._round()
        self._exact = None

    def state(self) -> dict[str, torch.Tensor]:
        """Returns the exact weights by name, for a checkpoint; inside `rounded` too."""
        if self._exact is not None:
            return self._exact
        return {name: weight.detach().clone() for name, weight in self._weights().items()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Puts exact weights into the model; raises `ValueError` if they are those of another one."""
        weights = self._weights()
        if {name: weight.shape for name, weight in weights.items()} != {n: exact.shape for n, exact in state.items()}:
            raise ValueError("its exact weights have other names or shapes")
        for name, weight in weights.items():
            weight.copy_(state[name])

    @torch.no_grad()
    def _round(self) -> None:
        weights = self._weights()
        self._exact = {name: weight.clone() for name, weight in weights.items()}
        again = self._uses % _EVERY == 0
        self._uses += 1
        q = largest_code(self._bits)
        for name, weight in weights.items():
            if again:
                self._steps[name] = self._choose(name, weight)
            steps = self._steps[name]
            # A channel without a scale has nothing but zeros, and stays so until scales are chosen again.
            codes = (weight / steps.where(steps > 0, 1)).round_().clamp_(-q, q)
            # No negative zero: a file has none.
            torch.mul(codes, steps, out=codes).add_(0.0)
            weight.copy_(codes)

    def _choose(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Returns the scales of a weight, in a shape that broadcasts over its values."""
        shape, store = self._model.specs[name].shape, self._model.store
        held = store is not None and name in store.layers
        # Inactive weights of masked storage are zeros, which stay zero and have no say in a scale.
        mask = self._model.mask_of(name, shape) if held else Mask.full(shape)
        values = weight.contiguous().cpu().numpy().reshape(-1)
        scales = best_scales(SparseTensor(mask, values), self._bits)
        found = np.repeat(scales, row_counts(mask)) if held else scales.reshape(-1, *(1,) * (len(shape) - 1))
        return torch.from_numpy(found).to(weight.device)

    def _weights(self) -> dict[str, torch.Tensor]:
        """Returns the values of every weight: active ones of a layer in compact storage, else all in their shape."""
        store, parameters = self._model.store, dict(self._model.module.named_parameters())
        found = {}
        for name, spec in self._model.specs.items():
            if not spec.weight:
                continue
            if store is not None and name in store.layers:
                found[name] = store.values_of(name).detach()
            elif name in parameters:
                found[name] = parameters[name].detach()
        return found
