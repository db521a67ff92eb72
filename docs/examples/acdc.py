"""AC/DC: training with dense and compressed phases in turn (Peste et al., NeurIPS 2021, algorithm 1), as a plugin.

In its `pyproject.toml`: acdc = "acdc:ACDC" under [project.entry-points."dsr_tool.methods"].
"""

import torch

from dsr_tool.errors import UsageError
from dsr_tool.methods import Method, Reallocation
from dsr_tool.methods.final_sparsity import active_count
from dsr_tool.methods.prune import smallest_of_all
from dsr_tool.sparse.active import Positions


class ACDC(Method):
    """Trains all weights and the largest of them in turn, and ends with the largest.

    A compression prunes the smallest magnitudes of the network; a decompression lets all weights grow again, from zero.
    """

    name = "acdc"

    def __init__(self, timing, final_sparsity, phases=4, warmup=0.1, rest=0.15):
        if phases < 1:
            raise UsageError(f"acdc phases {phases} is not allowed; give the number of compressed phases, 1 or more.")
        self.final_sparsity = float(final_sparsity)
        total = timing["total_steps"]
        length = total * (1 - warmup - rest) / (2 * phases - 1)
        # Phases begin at these steps, the first with a compression; the last phase is compressed as well.
        self.starts = [round(total * warmup + i * length) for i in range(2 * phases - 1)]
        self.final_step = self.starts[-1]

    def begin(self, sizes, counts):
        if sum(counts) < sum(sizes) and sum(counts) != active_count(self.final_sparsity, sizes):
            raise UsageError("acdc starts from a dense model; convert it with --sparsity 0.")

    def due(self, step):
        return step in self.starts

    def sparsity(self, step):
        phase = sum(start <= step for start in self.starts)
        return self.final_sparsity if phase % 2 else 0.0

    def update(self, weights, step, generator):
        nothing = Reallocation.nothing(weights)
        total = active_count(self.sparsity(step), weights.sizes)
        if total < sum(weights.counts):
            drop = smallest_of_all(weights, sum(weights.counts) - total)
            return Reallocation(Positions.of(weights.positions.flat[drop], weights.sizes), nothing.grown)
        free = torch.ones(total, dtype=torch.bool, device=weights.values.device)
        free[weights.positions.flat] = False
        return Reallocation(nothing.dropped, Positions.of(free.nonzero().squeeze(1), weights.sizes))
