"""dst: dynamic sparse training with trainable thresholds (Liu et al., ICLR 2020, section 3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import optim

from dsr_tool.errors import UsageError
from dsr_tool.methods.base import Method, Reallocation
from dsr_tool.methods.final_sparsity import final_budget, require_dense
from dsr_tool.methods.latent import LatentKeeper
from dsr_tool.methods.schedule import ReallocationSchedule, Timing
from dsr_tool.sparse.active import ActiveWeights, Positions
from dsr_tool.sparse.keeper import trained_by
from dsr_tool.sparse.mask_keeper import MaskKeeper
from dsr_tool.sparse.model import SparseModel

__all__ = ["DST", "long_tailed"]

_RATE, _MOMENTUM = 0.1, 0.9
"""Peak learning rate and momentum of the thresholds."""
_RAMP = 0.8
"""Fraction of the steps until the projection over which the density falls; it is constant for the rest."""
_GAIN, _LARGEST = 10.0, 10.0
"""Change of alpha, relative to its scale, per unit of log-density error; largest alpha relative to its scale."""
_MOST = 5e-2
"""Largest scale of alpha; with a larger one, thresholds would exceed all weights of an output."""
_LEARN = 50.0
"""Adaptation rate of log(scale of alpha) per unit of log-density error over the whole run."""
_LEAST = 0.25
"""Fraction of the final density that every output keeps until the projection."""


def long_tailed(x: torch.Tensor) -> torch.Tensor:
    """Returns the surrogate derivative of the step function (section 3): 2 - 4|x| up to 0.4, 0.4 up to 1, 0 beyond."""
    x = x.abs()
    beyond = x > 1
    return x.mul_(-4).add_(2).clamp_(min=0.4).masked_fill_(beyond, 0.0)


class DST(Method):
    """Trains a threshold for every output of a layer together with the weights, and masks the weights below it.

    Masked weights keep learning, through a surrogate derivative of the mask; a regulariser, alpha times the sum of
    exp(-threshold), raises the thresholds. An output whose weights are all masked has no gradient any more, and its
    threshold would rise for ever while alpha presses on the outputs that are left. So no threshold rises above the
    weights that would leave a quarter of the final density. The original sets the thresholds of a layer that is almost
    empty to zero instead, but a layer that is suddenly dense would unsettle alpha.

    The original has no budget: its sparsity is the result of alpha. Here alpha is controlled. It is larger while the
    network is denser than a cubic curve (Zhu & Gupta 2017) from dense to the final density, and negative while the
    network is sparser. The last update then projects: exactly the budget stays, by the largest |weight| - threshold
    over all layers, which is what raising or lowering all thresholds together until the number fits would keep; no
    layer becomes empty. From there on the masks are fixed. Control alone never gives an exact number, and projection
    alone would prune many weights at once; together they leave the projection a small correction, which is logged.

    Thresholds take their own steps, SGD with momentum at a rate that follows that of the optimizer from 0.1, so that
    they change alike under every optimizer. Masks follow them at each update, which in the original is every step.
    """

    name = "dst"
    summary = "trains a threshold per output of a dense model, ends exactly at the final sparsity"
    starts_dense = True
    computes_weights = True
    bytes_per_weight = 4  # the dense weight in fp32, until the projection

    def __init__(self, schedule: ReallocationSchedule, *, final_sparsity: float | str | None = None) -> None:
        """Sets the method up.

        Args:
            schedule: steps at which masks follow the thresholds; at the last one the final sparsity is reached.
            final_sparsity: fraction of zeros among the sparse weights at the end, in (0, 1).

        Raises:
            UsageError: the final sparsity is missing or outside its range.
        """
        self.schedule = schedule
        self.budget = final_budget(self.name, final_sparsity)
        self.final_sparsity = self.budget.sparsity
        self._sparsity = float(self.budget.sparsity or 0)
        self.final_step = schedule.last
        if not self.final_step:
            raise UsageError(f"dst has no update until step {schedule.stop}; train longer, or lower --every.")

    @classmethod
    def default_schedule(cls, timing: Timing) -> ReallocationSchedule:
        """Returns updates at equal distances until 75 % of the training."""
        return ReallocationSchedule.steady(**timing)

    def keep(
        self,
        model: SparseModel,
        optimizer: optim.Optimizer,
        *,
        seed: int,  # noqa: ARG002 - the interface has it
        before_masking: Callable[[], None] | None,  # noqa: ARG002
    ) -> MaskKeeper:
        """Copies the dense weights, and makes a threshold of zero for every output.

        Raises:
            UsageError: the model was converted with zeros, or the final sparsity cannot be reached.
        """
        # The model of a resumed run is sparse, though it was converted with all weights active.
        if model.config.conversion.get("active_weights") != model.prunable_weights:
            require_dense(self.name, model)
        dense = model.weights
        weights = [dense[name] for name in trained_by(model, optimizer)]
        count = sum(weight.numel() for weight in weights)
        self._total = self.budget.active_weights(count, 0, len(weights))
        self._keeper = LatentKeeper(model, optimizer, self._before_layer_step)
        self._thresholds = [weight.detach().new_zeros(len(weight)) for weight in weights]
        self._velocities = [torch.zeros_like(threshold) for threshold in self._thresholds]
        self._optimizer = self._keeper.optimizer  # inside a wrapper, the one that has groups
        # By index, because load_state_dict of an optimizer replaces the dicts of its groups.
        groups = {id(weight): i for i, group in enumerate(self._optimizer.param_groups) for weight in group["params"]}
        self._groups = [groups[id(weight)] for weight in weights]
        typical = sum(float(weight.detach().abs().sum()) for weight in weights) / max(count, 1)
        # With this alpha alone, thresholds reach the mean magnitude of the weights at the last update.
        self._scale = typical * (1 - _MOMENTUM) / (_RATE * self.final_step)
        self._alpha, self._controlled = self._scale, 0
        return self._keeper

    def due(self, step: int) -> bool:
        """Returns whether masks follow the thresholds after this step."""
        return self.schedule.due(step)

    def target(self, step: int) -> float:
        """Returns the wanted density after this step: a cubic from 1 to the final one."""
        left = max(1 - step / (_RAMP * self.final_step), 0.0)
        return 1 - self._sparsity * (1 - left**3)

    def _before_layer_step(self, index: int, dense: torch.Tensor, mask: torch.Tensor, gradient: torch.Tensor) -> None:
        """Turns the gradient of the masked weight into that of the dense one, and takes a step of the thresholds.

        With the masked weight P = W S(|W| - t) (section 3): dL/dW = dL/dP (S + |W| S') and dL/dt = -dL/dP W S', summed
        over the weights of each output.
        """
        threshold, velocity = self._thresholds[index], self._velocities[index]
        magnitude = dense.abs()
        structure = gradient * long_tailed(magnitude - _as_rows(threshold, dense))
        slope = (structure * dense).flatten(1).sum(1).add_(torch.exp(-threshold), alpha=self._alpha).neg_()
        gradient.mul_(mask).addcmul_(structure, magnitude)
        velocity.mul_(_MOMENTUM).add_(slope)
        # A threshold below zero masks nothing, and the gradient of exp(-threshold) grows without bound there.
        threshold.sub_(velocity, alpha=self._rate(index)).clamp_(min=0)

    def _rate(self, index: int) -> float:
        """Returns the learning rate of a layer's thresholds: the schedule of its weights, with peak `_RATE`."""
        group = self._optimizer.param_groups[self._groups[index]]
        peak = float(group.get("initial_lr", self._optimizer.defaults["lr"]))
        return _RATE * float(group["lr"]) / peak if peak else 0.0

    def update(self, weights: ActiveWeights, step: int, generator: torch.Generator) -> Reallocation:  # noqa: ARG002
        """Returns the masks that follow the thresholds; at the last update, exactly the budget, for the rest."""
        wanted, counts = self._wanted()
        density = sum(counts) / sum(weights.sizes)
        if step == self.final_step:
            projected = self._projected(weights.sizes)
            moved = int((wanted != projected).count_nonzero())
            facts = {"density_before_projection": density, "moved_by_projection": float(moved)}
            wanted = projected
        else:
            facts = {"density": density, "alpha": self._alpha}
            self._control(density, step)
        facts["threshold"] = float(torch.cat(self._thresholds).mean())
        active = weights.positions.flat
        dropped = active[~wanted[active]]
        wanted[active] = False
        grown = wanted.nonzero().squeeze(1)
        if step == self.final_step:
            self._keeper.settle_after_move()
        return Reallocation(Positions.of(dropped, weights.sizes), Positions.of(grown, weights.sizes), facts)

    def _control(self, density: float, step: int) -> None:
        """Sets alpha in proportion to the log-density error, on a scale that adapts slowly."""
        error = min(max(math.log(max(density, 1e-9) / self.target(step)), -1.0), 1.0)
        # In this order of operations: another one rounds differently, and seeded runs must keep their bits.
        grown = math.exp(_LEARN * error * (step - self._controlled) / self.final_step)
        self._scale = min(self._scale * grown, _MOST)
        self._controlled = step
        self._alpha = self._scale * min(max(1 + _GAIN * error, -_LARGEST), _LARGEST)

    def _wanted(self) -> tuple[torch.Tensor, list[int]]:
        """Returns a boolean vector over the network, True above the threshold, and the number of True per layer."""
        masks = [self._above(index) for index in range(len(self._thresholds))]
        counts: list[int] = torch.stack([mask.count_nonzero() for mask in masks]).tolist()
        return torch.cat([mask.reshape(-1) for mask in masks]), counts

    def _above(self, index: int) -> torch.Tensor:
        """Returns the mask of a layer's thresholds, after lowering those that leave an output too few weights."""
        magnitude, threshold = self._keeper.dense[index].abs(), self._thresholds[index]
        rows = magnitude.flatten(1)
        kept = max(round(_LEAST * (1 - self._sparsity) * rows.shape[1]), 1)
        threshold.copy_(torch.minimum(threshold, rows.topk(kept, sorted=False).values.amin(1)))
        return magnitude >= _as_rows(threshold, magnitude)

    def _projected(self, sizes: Sequence[int]) -> torch.Tensor:
        """Returns True at exactly the budget's positions of largest |weight| - threshold, one or more in each layer."""
        pairs = zip(self._keeper.dense, self._thresholds, strict=True)
        scores = torch.cat([(dense.abs() - _as_rows(t, dense)).reshape(-1).float() for dense, t in pairs])
        segments = zip(accumulate(sizes, initial=0), sizes, strict=False)
        largest = [start + scores[start : start + size].argmax() for start, size in segments]
        # An infinite score keeps the largest weight of each layer, so that no layer becomes empty.
        scores[torch.stack(largest)] = math.inf
        wanted = torch.zeros_like(scores, dtype=torch.bool)
        wanted[scores.topk(self._total, sorted=False).indices] = True
        return wanted

    def state_dict(self) -> dict[str, Any]:
        """Returns dense weights, thresholds and their momentum until the projection, and the control of alpha."""
        return {
            "dense": list(self._keeper.dense),
            "thresholds": self._thresholds,
            "velocities": self._velocities,
            "pull": self._scale,
            "alpha": self._alpha,
            "steered": self._controlled,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._keeper.restore(state["dense"])
        for name, mine in (("thresholds", self._thresholds), ("velocities", self._velocities)):
            for tensor, saved in zip(mine, state[name], strict=True):
                tensor.copy_(saved)
        # The keys are older than the attributes: runs that were stopped before the attributes were renamed must resume.
        self._scale, self._alpha = float(state["pull"]), float(state["alpha"])
        self._controlled = int(state["steered"])


def _as_rows(threshold: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Reshapes one threshold per output, shape (outputs,), to broadcast against a weight of shape (outputs, ...)."""
    return threshold.view(-1, *[1] * (weight.ndim - 1))
