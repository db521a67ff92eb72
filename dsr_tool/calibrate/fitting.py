"""Fits one layer: from what was sampled of its inputs and targets to its mask, values and bias."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from dsr_tool.calibrate.calls import rows_of_weight, weight_of_rows
from dsr_tool.calibrate.inputs import Sample, Statistics
from dsr_tool.calibrate.solver import Problem, largest_mask, solve
from dsr_tool.calibrate.survey import Layer
from dsr_tool.calibrate.wide import join_slices, solve_slices, split_slices
from dsr_tool.sparse.selection import choose
from dsr_tool.sparsity.granularity import Granularity

__all__ = ["Fitted", "Fitting", "by_magnitude"]

_LEAST_GAIN = 1e-3
"""Share of a norm's mean gain below which a channel's output is too small to repair the stream that it is added to."""


@dataclass(frozen=True)
class Fitted:
    """The result of fitting a layer.

    Attributes:
        mask: True where active, in the weight's shape.
        changes: new values of parameters and buffers by name.
        error: squared error of the outputs relative to their variance, or their square where no bias is free.
    """

    mask: torch.Tensor
    changes: dict[str, torch.Tensor]
    error: float


class Fitting:
    """One layer of a network: its matrices, and what may change with them.

    Attributes:
        layer: what a run showed about the layer.
        sums: the sums of everything that was added.
    """

    def __init__(self, module: nn.Module, layer: Layer) -> None:
        """Takes the network and one of its layers."""
        self.layer = layer
        self._state: dict[str, torch.Tensor] = {**dict(module.named_buffers()), **dict(module.named_parameters())}
        self._owner = module.get_submodule(layer.name.rpartition(".")[0])
        self._norm = module.get_submodule(layer.norm) if layer.norm else None
        self._slices = layer.slices
        # A copy, because the weight changes when it is fitted.
        self._weight = self._matrices(self._state[layer.name].detach().clone())
        self._outputs = self._weight.shape[0] // self._slices * self._weight.shape[1]
        self.sums = Statistics.zeros(*self._weight.shape)

    def _matrices(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the layer's weight, shape (groups or parts, in slices, rows, columns of a slice)."""
        rows = rows_of_weight(tensor, type(self._owner).__name__, self.layer.groups)
        blocks = rows.reshape(self.layer.groups * self.layer.parts, -1, rows.shape[-1])
        return split_slices(blocks, self._slices, self.layer.taps)

    def _tensor(self, matrices: torch.Tensor) -> torch.Tensor:
        """Returns the inverse of `_matrices`."""
        blocks = join_slices(matrices, self._slices, self.layer.taps)
        parts = blocks.reshape(self.layer.groups, -1, blocks.shape[-1])
        return weight_of_rows(parts, self._state[self.layer.name].shape, type(self._owner).__name__)

    @cached_property
    def _bias(self) -> tuple[str, int]:
        """Name of the layer's bias, empty if it has none, and the first of its entries that belong to this weight."""
        path, _, local = self.layer.name.rpartition(".")
        name = "in_proj_bias" if isinstance(self._owner, nn.MultiheadAttention) else "bias"
        full = f"{path}.{name}" if path else name
        part = {"k_proj_weight": 1, "v_proj_weight": 2}.get(local, 0)
        return (full if full in self._state else ""), part * self._outputs

    @property
    def _gain(self) -> torch.Tensor:
        """Factor of the norm that follows on every output, shape (outputs,); 1 without one."""
        if self._norm is None:
            return torch.ones(self._outputs)
        variance, weight = self._state[f"{self.layer.norm}.running_var"], self._norm.weight
        gain = (variance + float(getattr(self._norm, "eps", 0.0))).rsqrt()
        return gain * weight.detach() if isinstance(weight, torch.Tensor) else gain

    def add(self, dense: Sequence[Sample], sparse: Sequence[Sample]) -> None:
        """Adds the uses of the layer in one batch, in the dense and the sparse network."""
        for there, here in zip(dense, sparse, strict=False):
            assert here.inputs is not None and there.outputs is not None  # noqa: S101 - for the type checker
            rows = self._weight.shape[1]
            first = here.call.first_row // rows
            target = there.outputs
            if self.layer.joins and there.addend is not None and here.addend is not None:
                gain = self._gain
                usable = gain.abs() > _LEAST_GAIN * gain.abs().mean()
                target = target + torch.where(usable, (there.addend - here.addend) / gain, 0.0)
            # Groups have inputs of their own; parts that are read in one call share theirs.
            blocks = target.reshape(len(target), -1, rows).transpose(0, 1)
            inputs = here.inputs.expand(len(blocks), -1, -1)
            known = self.layer.aligned and len(inputs[0]) == len(target)
            if not known or self._slices > 1:
                blocks = self._from_inputs(first, inputs, blocks if known else None)
            self.sums.add(first * self._slices, split_slices(inputs, self._slices, self.layer.taps), blocks)

    def _from_inputs(self, first: int, inputs: torch.Tensor, target: torch.Tensor | None) -> torch.Tensor:
        """Returns what the dense weights of each slice make of the inputs, and its share of the rest of the target.

        Args:
            first: the first of the blocks.
            inputs: inputs of consecutive blocks, shape (blocks, vectors, columns).
            target: what the blocks should write, shape (blocks, vectors, rows). None where nothing in the dense network
                corresponds to the inputs: the rest is then the dense bias.

        Returns:
            Targets of the slices, shape (blocks * slices, vectors, rows).
        """
        count, slices = len(inputs), self._slices
        weight = self._weight[first * slices : (first + count) * slices]
        made = split_slices(inputs, slices, self.layer.taps) @ weight.mT
        rest = self._old_bias(first, count)
        if target is not None:
            rest = target - made.unflatten(0, (count, slices)).sum(1)
        # With equal shares, the slices together never repair more than there is.
        return made + (rest / slices).repeat_interleave(slices, 0)

    def _old_bias(self, first: int, count: int) -> torch.Tensor:
        name, start = self._bias
        if not name:
            return torch.zeros(count, 1, 1)
        rows = self._weight.shape[1]
        bias = self._state[name].detach()[start + first * rows : start + (first + count) * rows]
        return bias.reshape(count, 1, rows)

    def fit(self, count: int, granularity: Granularity) -> Fitted:
        """Returns the mask and values with `count` active weights, and the bias or mean that goes with them.

        The sums become means in place, so this is done once.
        """
        free = bool(self.layer.norm or self._bias[0])
        xx, tx, x, t, tt = self._means(centred=free)  # means are given back afterwards, so only what varies must fit
        importance = self._gain.square().reshape(-1, t.shape[1]).repeat_interleave(self._slices, 0)
        shape = self._state[self.layer.name].shape
        # A layer that stays dense may have any shape, and no blocks.
        blocks = granularity.blocks(shape) if count < shape.numel() else None
        unit, group = granularity.unit(shape), blocks.size if blocks else 0
        problem = Problem(self._weight, xx, tx, importance, self.sums.count.clamp_min(1), unit, group)
        if self._slices == 1:
            solution = solve(problem, count)
        else:
            solution = solve_slices(problem, count, self._slices, self.layer.taps)
        total = max(float((tt * importance).sum()), 1e-12)
        changes = {self.layer.name: self._tensor(solution.weight)}
        if free:
            left = t - (solution.weight @ x[..., None])[..., 0]
            changes.update(self._shifted(left.unflatten(0, (-1, self._slices)).sum(1).reshape(-1)))
        return Fitted(self._tensor(solution.mask), changes, max(problem.error(solution.weight) / total + 1, 0.0))

    def _means(self, *, centred: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns E[x x^T], E[t x^T], E[x], E[t] and E[t^2] by block, where centred of what varies.

        The sums become means in place, so this is done once.
        """
        sums = self.sums
        n = sums.count.clamp_min(1)[:, None]
        x, t, tt = sums.x / n, sums.t / n, sums.tt / n
        xx, tx = sums.xx.div_(n[..., None]), sums.tx.div_(n[..., None])
        origin = sums.origin
        if centred:
            xx.baddbmm_(x[:, :, None], x[:, None, :], alpha=-1)
            tx.baddbmm_(t[:, :, None], x[:, None, :], alpha=-1)
            tt -= t.square()
        else:
            xx.baddbmm_(origin[:, :, None], (x + origin)[:, None, :])
            xx.baddbmm_(x[:, :, None], origin[:, None, :])
            tx.baddbmm_(t[:, :, None], origin[:, None, :])
        return xx, tx, x + origin, t, tt

    def _shifted(self, bias: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns the norm's mean, or the bias, with which the outputs have the means of their targets."""
        name, start = self._bias
        if not self.layer.norm:
            value = self._state[name].detach().clone()
            value[start : start + len(bias)] = bias
            return {name: value}
        mean = f"{self.layer.norm}.running_mean"
        own = self._state[name].detach() if name else 0.0
        return {mean: self._state[mean] - bias + own}


def by_magnitude(module: nn.Module, name: str, count: int, granularity: Granularity) -> torch.Tensor:
    """Returns the mask of the `count` largest weights of a layer, in its shape; kernels count by their norm."""
    weight = module.get_parameter(name).detach()
    if granularity.blocks(weight.shape) is not None:
        return choose(weight, count, granularity, "magnitude", torch.Generator())
    scores, unit = weight.square(), granularity.unit(weight.shape)
    if unit == 1:
        return largest_mask(scores, count, 1)
    # Kernels are the last dimensions of a weight of any convolution.
    mask = largest_mask(scores.flatten(2).transpose(1, 2).flatten(1), count, unit)
    return mask.reshape(len(scores), unit, -1).transpose(1, 2).reshape(scores.shape)
