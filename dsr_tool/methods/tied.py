"""tied: weights that share values by a hash (Chen et al., Compressing Neural Networks with the Hashing Trick, 2015)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import optim

from dsr_tool.errors import UsageError
from dsr_tool.methods.base import Method, Reallocation
from dsr_tool.methods.final_sparsity import final_budget, require_dense
from dsr_tool.sparse.active import ActiveWeights
from dsr_tool.sparse.keeper import trained_by
from dsr_tool.sparse.mask_keeper import MaskKeeper
from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparsity.apportion import apportion

__all__ = ["Tied", "hashed"]


def hashed(count: int, seed: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the order in which a layer's positions are assigned to its values, and the sign of each position.

    Values are assigned in turn: with K of them, position `order[i]` has value number i mod K. So each is used, and as
    often as any other, to within one; a plain hash, as in the paper, leaves some unused if K is large.

    Args:
        count: number of weights of the layer.
        seed: seed of the run.
        layer: index of the layer.

    Returns:
        `order`, a permutation, int64 of shape (count,), and `sign`, 1 or -1 by position, int8 of shape (count,); both
        on the CPU.
    """
    first = np.random.SeedSequence([seed, layer]).generate_state(1, np.uint64)
    keys = _mixed(np.arange(count, dtype=np.uint64) + first)
    # The lowest bit is the sign, the other 63 the sort key, so that the two are independent.
    sign = 1 - 2 * (keys & np.uint64(1)).astype(np.int8)
    # The mix is a bijection, so no two keys are equal, and a stable sort breaks the few ties of the shifted keys.
    return torch.from_numpy(np.argsort(keys >> np.uint64(1), kind="stable")), torch.from_numpy(sign)


def _mixed(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Applies the finaliser of splitmix64 (Steele, Lea & Flood 2014): an input bit changes half of all output bits."""
    x = x * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed


class _Ties:
    """The assignment of a layer's positions to values.

    It takes 12 bytes per weight in fp32: order and value number as int32, and the sign in the type of the weight.
    """

    def __init__(self, weight: torch.Tensor, values: int, seed: int, layer: int) -> None:
        order, sign = hashed(weight.numel(), seed, layer)
        number = torch.empty(len(order), dtype=torch.int32)
        number[order] = torch.arange(len(order), dtype=torch.int32) % values
        self.values = values
        self._order = order.int().to(weight.device)
        self._number = number.to(weight.device)
        self._sign = sign.to(weight.device, weight.dtype)

    def summed(self, gradient: torch.Tensor) -> torch.Tensor:
        """Returns the gradient of each value, shape (values,): the signed sum over its positions (section 4)."""
        signed = (gradient.reshape(-1) * self._sign).index_select(0, self._order)
        # In rows of K, each column belongs to one value; the last row may be short. No atomic sums, so that every
        # device gives the same bits every time.
        whole = len(signed) // self.values * self.values
        sums = signed[:whole].view(-1, self.values).sum(0)
        rest = signed[whole:]
        sums[: len(rest)] += rest
        return sums

    def first(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns each value, shape (values,), read at its first position."""
        positions = self._order[: self.values]
        return weight.take(positions.long()).mul_(self._sign.index_select(0, positions))

    def spread(self, values: torch.Tensor, target: torch.Tensor) -> None:
        """Writes each value, with signs, to all its positions in `target`."""
        target.copy_(values.index_select(0, self._number).mul_(self._sign).view(target.shape))


class _TiedKeeper(MaskKeeper):
    """Gives all positions of a value the same gradient, and after each step the value of the first of them."""

    def __init__(self, model: SparseModel, optimizer: optim.Optimizer, seed: int, shares: Sequence[int]) -> None:
        super().__init__(model, optimizer)
        if isinstance(self.optimizer, optim.LBFGS):
            self.remove()
            raise UsageError(
                "LBFGS compares steps and gradients over all weights, and tied counts a value once for all of its "
                "positions; take another optimizer, such as SGD or Adam."
            )
        weights = [layer.weight for layer in self.layers]
        self.ties = {name: _Ties(weights[i], shares[i], seed, i) for i, name in enumerate(self.names)}
        self.tie()

    @torch.no_grad()
    def tie(self) -> None:
        """Sets all positions to the value at the first position of their value."""
        for name, ties in self.ties.items():
            weight = self._layers[name].weight
            ties.spread(ties.first(weight), weight.data)

    def mask_gradients(self) -> None:
        """Does nothing: no weight is inactive, and sums that are taken twice would be too large."""

    @torch.no_grad()
    def _clear_gradients(self) -> None:
        for name, gradient in self._gradients():
            if name in self.ties:
                self.ties[name].spread(self.ties[name].summed(gradient), gradient)

    def _before_closure(self) -> None:
        """Leaves gradients of before a closure as they are."""

    def _zero_outside(self) -> None:
        # Nothing is outside. Equal gradients are not enough: fused steps round the last few weights of a tensor
        # differently, and some optimizers treat weights differently by their place in the matrix.
        self.tie()

    def _tidy(self) -> None:
        self.tie()
        self._trust.stepped({name: layer.weight for name, layer in self._layers.items()})


class Tied(Method):
    """Gives every layer a few distinct values, and each of its positions one of them by a fixed hash, with a sign.

    The weights stay plain parameters. Before each step the gradients of all positions of a value are summed, and each
    position takes the sum; after the step all take the value of the first position. Values start as the weight at their
    first position, so that scales are those of the initialisation. All layers have the same share of distinct values.

    Nothing is zero here, so masks stay full, and files hold every position: a small file would need its own format.
    """

    name = "tied"
    summary = "shares a few values among the weights of each layer of a dense model by a hash"
    starts_dense = True
    computes_weights = True
    bytes_per_weight = 12  # order and value number as int32, sign as fp32; see _Ties

    def __init__(self, *, final_sparsity: float | str | None = None) -> None:
        """Sets the method up.

        Args:
            final_sparsity: 1 - distinct values / weights of the sparse layers, in [0, 1).

        Raises:
            UsageError: it is missing, or outside its range.
        """
        if final_sparsity is None:
            raise UsageError(
                "tied needs the share of weights to save; give --final-sparsity 0.9, for example, for a tenth as many "
                "values as weights, and a model converted with --sparsity 0."
            )
        self.budget = final_budget(self.name, final_sparsity)

    def keep(
        self,
        model: SparseModel,
        optimizer: optim.Optimizer,
        *,
        seed: int,
        before_masking: Callable[[], None] | None,  # noqa: ARG002 - the interface has it
    ) -> MaskKeeper:
        """Ties the weights.

        Raises:
            UsageError: the model is sparse, or has more layers than distinct values.
        """
        # One share for all layers, by largest remainder, so that the number of values is exact.
        size_of = model.sizes
        sizes = [size_of[name] for name in trained_by(model, optimizer)]
        require_dense(self.name, model)
        self.distinct = self.budget.active_weights(sum(sizes), 0, len(sizes))
        shares = apportion(self.distinct, sizes, sizes, [1] * len(sizes))
        return _TiedKeeper(model, optimizer, seed, shares)

    def due(self, step: int) -> bool:
        """Returns True after the first step, so that the number of values is logged once."""
        return step == 1

    def update(self, weights: ActiveWeights, step: int, generator: torch.Generator) -> Reallocation:  # noqa: ARG002
        """Returns an empty reallocation, with the number of distinct values for the log."""
        return Reallocation.nothing(weights, {"distinct_values": float(self.distinct)})
