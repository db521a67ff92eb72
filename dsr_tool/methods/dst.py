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
from dsr_tool.methods.schedule import ReallocationSchedule
from dsr_tool.sparse.active import ActiveWeights, Positions
from dsr_tool.sparse.keeper import MaskKeeper
from dsr_tool.sparse.model import SparseModel

__all__ = ["DST", "long_tailed"]

_RATE, _MOMENTUM = 0.1, 0.9
_RAMP = 0.8
"""Share of the time until the projection in which the density falls; then it is held."""
_GAIN, _LARGEST = 10.0, 10.0
_MOST = 5e-2
"""Scale of alpha from which on thresholds would run past whatever weights an output has."""
_LEARN = 50.0
"""How fast the scale of alpha adapts: by e to this power over the whole time, were the density e times too high."""
_LEAST = 0.25
"""Share of the final density that every output keeps until the projection."""


def long_tailed(x: torch.Tensor) -> torch.Tensor:
    """What stands for the derivative of the step function: 2 - 4|x| up to 0.4, 0.4 up to 1, 0 beyond (section 3)."""
    x = x.abs()
    beyond = x > 1
    return x.mul_(-4).add_(2).clamp_(min=0.4).masked_fill_(beyond, 0.0)


class DST(Method):
    """Train a threshold for every output of a layer together with the weights; what lies below it is masked.

    Weights keep learning while they are masked, through a stand-in for the derivative of the mask; a regulariser,
    alpha times the sum of exp(-threshold), pulls the thresholds up. An output whose weights are all masked has a
    gradient no more, and its threshold would rise for ever while alpha presses on the outputs that are left; so no
    threshold rises above the weights of which a quarter of the final density would be left. The original sets the
    thresholds of a layer that is almost empty to zero, but one that is suddenly dense would unsettle alpha.

    The original cannot be told a budget: its sparsity is what alpha makes of it. Here alpha is steered: it is larger
    while the network is denser than a cubic curve (Zhu & Gupta 2017) from dense to the final density, negative while it
    is sparser. The last update then projects: exactly the budget stays, by the largest |weight| - threshold over all
    layers, which is what raising or lowering all thresholds together until the number fits would keep; no layer
    is emptied. From there on the masks are fixed. Steering alone never hits a number exactly, and projecting
    alone would move many weights at once; together the projection is left a small correction, which the log states.

    Thresholds take steps of their own, SGD with momentum at a rate that follows that of the optimizer from 0.1, so
    that they move alike under every optimizer. Masks follow them at each update, which in the original is every step.
    """

    name = "dst"

    def __init__(self, schedule: ReallocationSchedule, *, final_sparsity: float | str | None = None) -> None:
        """Set the method up.

        Args:
            schedule: when masks follow the thresholds; at its last step the final sparsity is reached.
            final_sparsity: fraction of zeros among the sparse weights at the end, in (0, 1).

        Raises:
            UsageError: no final sparsity, or one outside its range.
        """
        self.schedule = schedule
        self.budget = final_budget(self.name, final_sparsity)
        self._sparsity = float(self.budget.sparsity or 0)
        self.last = schedule.last
        if not self.last:
            raise UsageError(f"dst has no update until step {schedule.stop}; train longer, or lower --every.")

    def keep(
        self,
        model: SparseModel,
        optimizer: optim.Optimizer,
        *,
        seed: int,  # noqa: ARG002 - the seam's signature
        before_masking: Callable[[], None] | None,  # noqa: ARG002
    ) -> MaskKeeper:
        """Keep the dense weights, and make a threshold of zero for every output.

        Raises:
            UsageError: the model was sparse from the start, or the final sparsity cannot be reached.
        """
        # A run that is resumed has a sparse model, which was converted as a dense one.
        if model.config.conversion.get("active_weights") != model.prunable_weights:
            require_dense(self.name, model)
        weights = [model.weights[name] for name in model.trained]
        count = sum(weight.numel() for weight in weights)
        self._total = self.budget.active_weights(count, 0, len(weights))
        self._keeper = LatentKeeper(model, optimizer, self._turn)
        self._thresholds = [weight.detach().new_zeros(len(weight)) for weight in weights]
        self._velocities = [torch.zeros_like(threshold) for threshold in self._thresholds]
        # By number, since loading a state makes new groups.
        groups = {id(weight): i for i, group in enumerate(optimizer.param_groups) for weight in group["params"]}
        self._groups = [groups[id(weight)] for weight in weights]
        self._optimizer = optimizer
        typical = sum(float(weight.detach().abs().sum()) for weight in weights) / max(count, 1)
        # With this alpha alone, thresholds travel a typical weight's size until the last update.
        self._pull = typical * (1 - _MOMENTUM) / (_RATE * self.last)
        self._alpha, self._steered = self._pull, 0
        return self._keeper

    def due(self, step: int) -> bool:
        """Whether masks follow the thresholds after this step."""
        return self.schedule.due(step)

    def target(self, step: int) -> float:
        """Density that is steered for after this step: a cubic from 1 to the final one."""
        left = max(1 - step / (_RAMP * self.last), 0.0)
        return 1 - self._sparsity * (1 - left**3)

    def _turn(self, index: int, dense: torch.Tensor, mask: torch.Tensor, gradient: torch.Tensor) -> None:
        """Gradient of the masked weight P = W S(|W| - t) to that of W, and a step of t (section 3).

        dL/dW = dL/dP (S + |W| S') and dL/dt = -dL/dP W S', summed over each output's weights.
        """
        threshold, velocity = self._thresholds[index], self._velocities[index]
        magnitude = dense.abs()
        structure = gradient * long_tailed(magnitude - _as_rows(threshold, dense))
        slope = (structure * dense).flatten(1).sum(1).add_(torch.exp(-threshold), alpha=self._alpha).neg_()
        gradient.mul_(mask).addcmul_(structure, magnitude)
        velocity.mul_(_MOMENTUM).add_(slope)
        # Below zero a threshold masks nothing, but the exponential would let it run away.
        threshold.sub_(velocity, alpha=self._rate(index)).clamp_(min=0)

    def _rate(self, index: int) -> float:
        """Learning rate of a layer's thresholds: that of its weights, with another peak."""
        group = self._optimizer.param_groups[self._groups[index]]
        peak = float(group.get("initial_lr", self._optimizer.defaults["lr"]))
        return _RATE * float(group["lr"]) / peak if peak else 0.0

    def update(self, weights: ActiveWeights, step: int, generator: torch.Generator) -> Reallocation:  # noqa: ARG002
        """Let masks follow the thresholds; at the last update, exactly the budget stays for good."""
        wanted, counts = self._wanted()
        density = sum(counts) / sum(weights.sizes)
        if step == self.last:
            projected = self._projected(weights.sizes)
            moved = int((wanted != projected).count_nonzero())
            facts = {"density_before_projection": density, "moved_by_projection": float(moved)}
            wanted = projected
        else:
            facts = {"density": density, "alpha": self._alpha}
            self._steer(density, step)
        facts["threshold"] = float(torch.cat(self._thresholds).mean())
        active = weights.positions.flat
        dropped = active[~wanted[active]]
        wanted[active] = False
        grown = wanted.nonzero().squeeze(1)
        if step == self.last:
            self._keeper.settle_after_move()
        return Reallocation(Positions.of(dropped, weights.sizes), Positions.of(grown, weights.sizes), facts)

    def _steer(self, density: float, step: int) -> None:
        """Alpha in proportion to how much too dense the network is, on a scale that slowly adapts."""
        error = min(max(math.log(max(density, 1e-9) / self.target(step)), -1.0), 1.0)
        self._pull = min(self._pull * math.exp(_LEARN * error * (step - self._steered) / self.last), _MOST)
        self._steered = step
        self._alpha = self._pull * min(max(1 + _GAIN * error, -_LARGEST), _LARGEST)

    def _wanted(self) -> tuple[torch.Tensor, list[int]]:
        """Whether each weight of the network exceeds its threshold, and how many do per layer."""
        masks = [self._above(index) for index in range(len(self._thresholds))]
        counts: list[int] = torch.stack([mask.count_nonzero() for mask in masks]).tolist()
        return torch.cat([mask.reshape(-1) for mask in masks]), counts

    def _above(self, index: int) -> torch.Tensor:
        """The mask that a layer's thresholds make, after they were kept from masking too much of any output."""
        magnitude, threshold = self._keeper.dense[index].abs(), self._thresholds[index]
        rows = magnitude.flatten(1)
        kept = max(round(_LEAST * (1 - self._sparsity) * rows.shape[1]), 1)
        threshold.copy_(torch.minimum(threshold, rows.topk(kept, sorted=False).values.amin(1)))
        return magnitude >= _as_rows(threshold, magnitude)

    def _projected(self, sizes: Sequence[int]) -> torch.Tensor:
        """True at exactly the budget's positions of largest |weight| - threshold, at least one of each layer."""
        pairs = zip(self._keeper.dense, self._thresholds, strict=True)
        scores = torch.cat([(dense.abs() - _as_rows(t, dense)).reshape(-1).float() for dense, t in pairs])
        segments = zip(accumulate(sizes, initial=0), sizes, strict=False)
        largest = [start + scores[start : start + size].argmax() for start, size in segments]
        scores[torch.stack(largest)] = math.inf
        wanted = torch.zeros_like(scores, dtype=torch.bool)
        wanted[scores.topk(self._total, sorted=False).indices] = True
        return wanted

    def state_dict(self) -> dict[str, Any]:
        """Dense weights, thresholds and their momentum until the projection, and what steers alpha."""
        return {
            "dense": list(self._keeper.dense),
            "thresholds": self._thresholds,
            "velocities": self._velocities,
            "pull": self._pull,
            "alpha": self._alpha,
            "steered": self._steered,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._keeper.restore(state["dense"])
        for name, mine in (("thresholds", self._thresholds), ("velocities", self._velocities)):
            for tensor, saved in zip(mine, state[name], strict=True):
                tensor.copy_(saved)
        self._pull, self._alpha = float(state["pull"]), float(state["alpha"])
        self._steered = int(state["steered"])


def _as_rows(threshold: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """One threshold for each entry of the first dimension, to be compared with a whole weight."""
    return threshold.view(-1, *[1] * (weight.ndim - 1))
