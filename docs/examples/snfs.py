"""Sparse momentum, or sparse networks from scratch (Dettmers & Zettlemoyer 2019, section 3), as a plugin.

In its `pyproject.toml`: my-snfs = "snfs:SNFS" under [project.entry-points."dsr_tool.methods"]. dsr-tool has the same
method under the name snfs, which takes the shares of the layers from the smoothed gradients and checks its options.
"""

import math

import torch

from dsr_tool.methods import Method, Reallocation, ReallocationSchedule
from dsr_tool.methods.grow import regrow
from dsr_tool.methods.prune import cosine, smallest
from dsr_tool.sparsity.apportion import apportion


class SNFS(Method):
    """Prunes a share of each layer, and grows where smoothed gradients are largest, in layers with much momentum."""

    name = "my-snfs"
    needs_gradients = needs_momentum = continuous = True

    def __init__(self, timing, drop_fraction=0.5, smoothing=0.9):
        self.schedule = ReallocationSchedule.steady(**{"stop": 1.0, "updates": 100, **timing})
        self.drop_fraction, self.smoothing, self.smoothed = drop_fraction, smoothing, []

    def due(self, step):
        return 0 < step <= self.schedule.stop

    def update(self, weights, step, generator):
        self.smoothed = self.smoothed or [torch.zeros_like(gradient) for gradient in weights.gradients]
        for smoothed, gradient in zip(self.smoothed, weights.gradients, strict=True):
            smoothed.lerp_(gradient, 1 - self.smoothing)
        if not self.schedule.due(step):
            return Reallocation.nothing(weights)
        share = cosine(self.drop_fraction, step, self.schedule.stop)
        counts = [min(math.ceil(share * active), active - 1) for active in weights.counts]
        layers = weights.momentum.abs().split(list(weights.counts))
        room = [free + lost for free, lost in zip(weights.free, counts, strict=True)]
        wanted = apportion(sum(counts), [float(layer.sum() / len(layer)) for layer in layers], room)
        return Reallocation(*regrow(weights, smallest(weights, counts), self.smoothed, wanted))

    def state_dict(self):
        return {"smoothed": self.smoothed}

    def load_state_dict(self, state):
        self.smoothed = [tensor.clone() for tensor in state["smoothed"]]
