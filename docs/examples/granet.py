"""GraNet: gradual pruning with neuroregeneration (Liu et al., NeurIPS 2021, section 4), as a plugin.

In its `pyproject.toml`: my-granet = "granet:GraNet" under [project.entry-points."dsr_tool.methods"]. dsr-tool has the
same method under the name granet, with checks of its options.
"""

from fractions import Fraction

from dsr_tool.methods import Method, Reallocation, ReallocationSchedule
from dsr_tool.methods.final_sparsity import active_count, cubic_sparsity
from dsr_tool.methods.grow import regrow
from dsr_tool.methods.prune import cosine, smallest, smallest_of_all
from dsr_tool.sparse.active import Positions


class GraNet(Method):
    """Prunes the smallest weights of the network along a cubic curve, and moves a share of each layer by gradient."""

    name = "my-granet"
    needs_gradients = True

    def __init__(self, timing, final_sparsity, drop_fraction=0.5):
        self.final_sparsity, self.drop_fraction = Fraction(str(final_sparsity)), drop_fraction
        self.schedule = ReallocationSchedule.steady(**{"stop": 1.0, "updates": 100, **timing})
        self.final_step = ReallocationSchedule(self.schedule.periods, self.schedule.stop // 2).last

    def begin(self, sizes, counts):
        self.first = Fraction(sum(sizes) - sum(counts), sum(sizes))

    def due(self, step):
        return self.schedule.due(step)

    def sparsity(self, step):
        return cubic_sparsity(self.first, self.final_sparsity, step, self.final_step)

    def update(self, weights, step, generator):
        total = active_count(self.sparsity(step), weights.sizes)
        drop = smallest_of_all(weights, sum(weights.counts) - total)
        gone = Positions.of(weights.positions.flat[drop], weights.sizes).counts
        share = cosine(self.drop_fraction, step, self.schedule.stop)
        moved = [int(share * (had - lost)) for had, lost in zip(weights.counts, gone, strict=True)]
        drop = smallest(weights, [lost + more for lost, more in zip(gone, moved, strict=True)])
        return Reallocation(*regrow(weights, drop, weights.gradients, moved), {"drop_fraction": share})

    def state_dict(self):
        return {"first": str(self.first)}

    def load_state_dict(self, state):
        self.first = Fraction(state["first"])
