"""From a module to a SparseModel: layers, exact counts, and which weights are active."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from dsr_tool.errors import UsageError, unknown_name
from dsr_tool.sparse.discover import Rules, count, discover
from dsr_tool.sparse.macs import with_macs
from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparsity.budget import Budget
from dsr_tool.sparsity.config import ModelConfig
from dsr_tool.sparsity.distribution import DISTRIBUTIONS, by_magnitude, erk, largest, uniform
from dsr_tool.sparsity.granularity import GRANULARITIES, unit_size, whole_units
from dsr_tool.sparsity.layers import LayerSpec

__all__ = ["POSITIONS", "Plan", "sparsify"]

POSITIONS = ("magnitude", "random")


class Plan:
    """A module that is about to become sparse, and the masks that any number of active weights would give it.

    Nothing is changed before `finish`, so that several numbers can be tried. The same number gives the same masks, and
    with random positions those of a smaller number lie within those of a larger one, where the distribution allows.

    Attributes:
        module: the network, with all its weights.
        specs: one `LayerSpec` per state_dict entry; with multiply-adds where the input shape is known.
        config: what the model is.
        sparse: the specs of the sparse layers alone.
        units: weights of each sparse layer that are active or inactive together.
    """

    def __init__(
        self,
        module: nn.Module,
        config: ModelConfig,
        *,
        distribution: str = "uniform",
        positions: str = "magnitude",
        granularity: str = "weight",
        rules: Rules | None = None,
        seed: int = 0,
    ) -> None:
        """Find the layers; see `sparsify` for the arguments and what is raised."""
        if distribution not in DISTRIBUTIONS:
            raise unknown_name("distribution", distribution, DISTRIBUTIONS)
        if positions not in POSITIONS:
            raise unknown_name("positions", positions, POSITIONS)
        if granularity not in GRANULARITIES:
            raise unknown_name("granularity", granularity, GRANULARITIES)
        specs = discover(module, rules)
        self.module, self.config = module, config
        self.specs = with_macs(module, specs, config.input_shape) if config.input_shape else specs
        self.sparse = [spec for spec in self.specs.values() if spec.role == "sparse"]
        self._distribution, self._positions, self._seed = distribution, positions, seed
        self._granularity = granularity
        self.units = [unit_size(spec.shape, granularity) for spec in self.sparse]
        _check_values(module, self.specs)

    @property
    def prunable(self) -> int:
        """Weights of all sparse layers: the most that can be active."""
        return sum(spec.size for spec in self.sparse)

    @property
    def least(self) -> int:
        """The fewest weights that can be active: one weight or kernel per sparse layer."""
        return sum(self.units)

    def exact(self, budget: Budget) -> int:
        """The number of active weights that a sparsity or a number of parameters means here.

        Raises:
            UsageError: nobody can meet it.
        """
        if not self.sparse and budget.sparsity:
            raise UsageError(
                f"sparsity {float(budget.sparsity):g} cannot be reached: no layer of this model is left to be sparse, "
                f"so the highest reachable sparsity is 0; keep fewer layers dense."
            )
        other = count(self.specs)["parameters"] - self.prunable
        total = budget.active_weights(self.prunable, other, len(self.sparse))
        if total < self.least:
            raise UsageError(
                f"{total:,} active weights are too few at --granularity kernel, where each of the {len(self.sparse)} "
                f"sparse layers keeps a kernel; allow {self.least:,} or more, or give --granularity weight."
            )
        return total

    @torch.no_grad()
    def counts(self, total: int) -> dict[str, int]:
        """Active weights per sparse layer, `total` in all, or the nearest from below that whole kernels can make."""
        if not self.sparse:
            return {}
        if self._distribution == "magnitude":
            parameters = dict(self.module.named_parameters())
            weights = [parameters[spec.name].detach().float().cpu().numpy() for spec in self.sparse]
            counts = by_magnitude(total, weights)
        else:
            counts = (uniform if self._distribution == "uniform" else erk)(total, [spec.shape for spec in self.sparse])
        if any(unit > 1 for unit in self.units):
            whole = whole_units(counts, [spec.size for spec in self.sparse], self.units)
            counts = [count * unit for count, unit in zip(whole, self.units, strict=True)]
        return {spec.name: active for spec, active in zip(self.sparse, counts, strict=True)}

    @torch.no_grad()
    def tried(self, total: int, budget: Budget) -> SparseModel:
        """The model with `total` active weights, but with the values of the others still in place."""
        generator = torch.Generator().manual_seed(self._seed)
        parameters = dict(self.module.named_parameters())
        counts = self.counts(total)
        masks = {
            name: _choose(parameters[name], active, unit, self._positions, generator)
            for (name, active), unit in zip(counts.items(), self.units, strict=True)
        }
        conversion = {
            **self.config.conversion,
            **budget.to_record(),
            "distribution": self._distribution,
            "positions": self._positions,
            "granularity": self._granularity,
            "seed": self._seed,
            "active_weights": sum(counts.values()),
        }
        return SparseModel(self.module, self.specs, masks, replace(self.config, conversion=conversion))

    def finish(self, total: int, budget: Budget) -> SparseModel:
        """The model with `total` active weights; all others become zero in the module, so that this is the end."""
        model = self.tried(total, budget)
        model.apply_masks()
        return model


def sparsify(
    module: nn.Module,
    config: ModelConfig,
    budget: Budget,
    *,
    distribution: str = "uniform",
    positions: str = "magnitude",
    granularity: str = "weight",
    rules: Rules | None = None,
    seed: int = 0,
) -> SparseModel:
    """Make a module sparse in place: exactly as many active weights as the budget says.

    Args:
        module: the network; weights that become inactive are set to zero.
        config: what it is; with an `input_shape`, multiply-adds are counted.
        budget: how many weights may be active, as a sparsity or a number of parameters.
        distribution: `uniform`, `erk` or `magnitude`.
        positions: `magnitude` keeps the largest weights of each layer, `random` any.
        granularity: `weight`, or `kernel` for masks made of whole kernels in convolutions; the number of active weights
            is then the nearest from below that whole kernels can make.
        rules: which layers stay dense.
        seed: of the random positions.

    Raises:
        UsageError: an option nobody knows, a budget nobody can meet, or weights that are not float.
    """
    plan = Plan(
        module,
        config,
        distribution=distribution,
        positions=positions,
        granularity=granularity,
        rules=rules,
        seed=seed,
    )
    return plan.finish(plan.exact(budget), budget)


def _check_values(module: nn.Module, specs: Mapping[str, LayerSpec]) -> None:
    for name, weight in module.named_parameters():
        if specs[name].role != "sparse":
            continue
        if not weight.is_floating_point():
            raise UsageError(f"weight {name!r} is of {weight.dtype}; only real floating-point weights can be sparse.")
        if not torch.isfinite(weight).all():
            raise UsageError(f"weight {name!r} holds values that are not finite; take weights from before that.")


def _choose(weight: torch.Tensor, active: int, unit: int, positions: str, generator: torch.Generator) -> torch.Tensor:
    """A mask with exactly `active` entries in whole units, in the memory format of the weight."""
    if positions == "random":
        chosen = torch.randperm(weight.numel() // unit, generator=generator)[: active // unit]
    else:
        magnitude = weight.detach().float().abs().reshape(-1, unit).mean(1).cpu().numpy()
        chosen = torch.from_numpy(largest(magnitude, active // unit))
    mask = torch.zeros(weight.numel() // unit, unit, dtype=torch.bool)
    mask[chosen] = True
    return torch.empty_like(weight, dtype=torch.bool).copy_(mask.reshape(weight.shape))
