"""tied: weights that share values by a hash (Chen et al., Compressing Neural Networks with the Hashing Trick, 2015)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import optim

from dsr_tool.errors import UsageError
from dsr_tool.methods.base import Method, Reallocation
from dsr_tool.methods.final_sparsity import final_budget, require_dense
from dsr_tool.sparse.active import ActiveWeights, Positions
from dsr_tool.sparse.keeper import MaskKeeper
from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparsity.budget import apportion

__all__ = ["Tied", "hashed"]


def hashed(count: int, seed: int, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The order in which a layer's positions take their turns at its values, and the sign of each.

    Values are dealt out like cards: with K of them, position `order[i]` has value number i mod K. So each is used, and
    as often as any other, to within one; a plain hash, as in the paper, leaves some unused where K is large.

    Args:
        count: weights of the layer.
        seed: of the run.
        layer: its number.

    Returns:
        `order`, a permutation as int64, and `sign`, of 1 and -1 as int8 by position; both on the CPU.
    """
    first = np.random.SeedSequence([seed, layer]).generate_state(1, np.uint64)
    keys = _mixed(np.arange(count, dtype=np.uint64) + first)
    sign = 1 - 2 * (keys & np.uint64(1)).astype(np.int8)
    # The mix is one-to-one, so that no two keys are equal.
    return torch.from_numpy(np.argsort(keys >> np.uint64(1), kind="stable")), torch.from_numpy(sign)


def _mixed(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea & Flood 2014): every bit of a counter changes half of all bits."""
    x = x * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed


class _Ties:
    """Which positions of a layer share a value, and with which sign; 12 bytes for each weight in fp32."""

    def __init__(self, weight: torch.Tensor, values: int, seed: int, layer: int) -> None:
        order, sign = hashed(weight.numel(), seed, layer)
        place = torch.empty(len(order), dtype=torch.int32)
        place[order] = torch.arange(len(order), dtype=torch.int32) % values
        self.values = values
        self._order = order.int().to(weight.device)
        self._place = place.to(weight.device)
        self._sign = sign.to(weight.device, weight.dtype)

    def summed(self, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient of each value: the sum over its positions, with their signs (section 4)."""
        signed = (gradient.reshape(-1) * self._sign).index_select(0, self._order)
        # In rows of K, each column belongs to one value; the last row may be short. No atomic sums, so that every
        # device gives the same bits every time.
        whole = len(signed) // self.values * self.values
        sums = signed[:whole].view(-1, self.values).sum(0)
        rest = signed[whole:]
        sums[: len(rest)] += rest
        return sums

    def first(self, weight: torch.Tensor) -> torch.Tensor:
        """Each value as its first position has it."""
        positions = self._order[: self.values]
        return weight.take(positions.long()).mul_(self._sign.index_select(0, positions))

    def spread(self, values: torch.Tensor, target: torch.Tensor) -> None:
        """Write each value, with signs, to all its positions."""
        target.copy_(values.index_select(0, self._place).mul_(self._sign).view(target.shape))


class _TiedKeeper(MaskKeeper):
    """Gives all positions of a value the same gradient, and after each step the value of the first of them."""

    def __init__(self, model: SparseModel, optimizer: optim.Optimizer, seed: int, shares: Sequence[int]) -> None:
        super().__init__(model, optimizer)
        weights = [layer.weight for layer in self._layers]
        self.ties = [_Ties(weight, shares[i], seed, i) for i, weight in enumerate(weights)]
        self.tie()

    @torch.no_grad()
    def tie(self) -> None:
        """Set all positions to what the first one of their value has."""
        for ties, layer in zip(self.ties, self._layers, strict=True):
            ties.spread(ties.first(layer.weight), layer.weight.data)

    @torch.no_grad()
    def _before_step(self, _: optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._refuse_closure(args, kwargs)
        for index, gradient in self._gradients():
            self.ties[index].spread(self.ties[index].summed(gradient), gradient)

    def _after_step(self, _: optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG002
        # Fused steps round the last few weights of a tensor in another way, and some optimizers tell weights apart.
        self.tie()


class Tied(Method):
    """Give every layer a few distinct values, and each of its positions one of them by a fixed hash, with a sign.

    The weights stay plain parameters: the gradients of all positions of a value are summed before each step, each
    position takes that sum, and after the step the value of the first position is given to all. Values begin as the
    weight at their first position, so that scales are those of the initialisation. All layers have the same share of
    distinct values.

    Nothing is zero here, so masks stay full, and files hold every position: a small file needs a format of its own.
    """

    name = "tied"

    def __init__(self, *, final_sparsity: float | str | None = None) -> None:
        """Set the method up.

        Args:
            final_sparsity: 1 - distinct values / weights of the sparse layers, in [0, 1).

        Raises:
            UsageError: no final sparsity, or one outside its range.
        """
        if final_sparsity is None:
            raise UsageError(
                "tied needs to know how few values there are; give --final-sparsity 0.9, say, for a tenth of the "
                "weights, and a model of sparsity 0."
            )
        self.budget = final_budget(self.name, final_sparsity)

    def keep(
        self,
        model: SparseModel,
        optimizer: optim.Optimizer,
        *,
        seed: int,
        before_masking: Callable[[], None] | None,  # noqa: ARG002 - the seam's signature
    ) -> MaskKeeper:
        """Tie the weights.

        Raises:
            UsageError: the model is sparse, or has fewer weights than layers times values.
        """
        sizes = [model.masks[name].numel() for name in model.trained]
        require_dense(self.name, model)
        self.distinct = self.budget.active_weights(sum(sizes), 0, len(sizes))
        shares = apportion(self.distinct, sizes, sizes, [1] * len(sizes))
        return _TiedKeeper(model, optimizer, seed, shares)

    def due(self, step: int) -> bool:
        """Once, to state how many values there are."""
        return step == 1

    def update(self, weights: ActiveWeights, step: int, generator: torch.Generator) -> Reallocation:  # noqa: ARG002
        """Move nothing."""
        none = Positions(weights.sizes, (0,) * len(weights.sizes), weights.positions.flat[:0])
        return Reallocation(none, none, {"distinct_values": float(self.distinct)})
