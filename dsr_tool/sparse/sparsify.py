"""Makes a module sparse: finds its layers, computes exact counts, and chooses which weights are active."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace

import torch
from torch import nn

from dsr_tool.errors import UsageError, unknown_name
from dsr_tool.sparse.compact.modules import install
from dsr_tool.sparse.compact.store import CompactStore, Entry
from dsr_tool.sparse.contract import require_values
from dsr_tool.sparse.discover import Rules, count, discover
from dsr_tool.sparse.in_file import read
from dsr_tool.sparse.layer_counts import LayerCounts
from dsr_tool.sparse.macs import with_macs
from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparse.selection import POSITIONS, choose
from dsr_tool.sparsity.budget import Budget
from dsr_tool.sparsity.config import ModelConfig
from dsr_tool.sparsity.distribution import DISTRIBUTIONS
from dsr_tool.sparsity.granularity import Granularity, whole_units
from dsr_tool.sparsity.layers import LayerSpec

__all__ = ["Sparsifier", "sparsify"]


class Sparsifier:
    """A dense module, and the masks that any number of active weights gives it.

    The module does not change before `apply`, so several numbers can be previewed. The same number always gives the
    same masks. With random positions, the masks of a smaller number lie within those of a larger one if each layer gets
    at least as many weights with the larger one.

    Attributes:
        module: the network, with all its weights.
        specs: one `LayerSpec` per state_dict entry, by name; with multiply-adds if the input shape is known.
        config: description of the model.
        sparse: the specs of the sparse layers.
        granularity: which weights are active together, and which positions share a number of active ones.
        steps: for each sparse layer, the number of which its active weights are a multiple; see `Granularity.step`.
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
        importance: Mapping[str, torch.Tensor] | None = None,
        shares: Mapping[str, float] | None = None,
        spread: Callable[[int], list[int]] | None = None,
        fresh: Collection[str] = (),
        allow_starved: bool = False,
    ) -> None:
        """Finds the layers; see `sparsify` for the other arguments and errors.

        Args:
            module: the network.
            config: description of the model.
            distribution: one of `DISTRIBUTIONS`, or with `spread` any name, for the record.
            positions: see `sparsify`.
            granularity: see `sparsify`.
            rules: see `sparsify`.
            seed: see `sparsify`.
            importance: for sparse weights by name, non-negative values of the weight's shape that replace |w| wherever
                weights are ranked: for the positions `magnitude` and the distribution `lamp`.
            shares: for the distribution `lamp`, the share of each layer in what later layers read; see `Lamp`.
            spread: number of active weights of each sparse layer, in the order of `sparse`, for a total.
            fresh: names of weights that were never trained. Where values decide, they get the density of the network
                and random positions, because their values mean nothing.
            allow_starved: whether `lamp` may leave a layer fewer weights than `floors` says.
        """
        if distribution not in DISTRIBUTIONS and spread is None:
            raise unknown_name("distribution", distribution, DISTRIBUTIONS)
        if positions not in POSITIONS:
            raise unknown_name("positions", positions, POSITIONS)
        self.granularity = Granularity.parse(granularity)
        specs = discover(module, replace(rules or Rules(), granularity=self.granularity))
        # Magnitudes of NaN have no order, so a mask chosen by them would be arbitrary.
        require_values(module)
        _check_types(module, specs)
        self.module, self.config = module, config
        self.specs = with_macs(module, specs, config.input_shape) if config.input_shape else specs
        self.sparse = [spec for spec in self.specs.values() if spec.role == "sparse"]
        self._distribution, self._positions, self._seed = distribution, positions, seed
        self._fresh, self._importance = frozenset(fresh), importance or {}
        self.steps = [self.granularity.step(spec.shape) for spec in self.sparse]
        if self.granularity.density is not None:
            # Every layer has the density of the pattern, whatever its scores are.
            self._distribution, spread = "uniform", lambda _: self.steps
        own = LayerCounts(
            module,
            self.sparse,
            distribution if spread is None else "uniform",
            importance=self._importance,
            shares=shares or {},
            fresh=self._fresh,
            allow_starved=allow_starved,
        )
        self._spread, self._least = (own, own.least) if spread is None else (spread, 0)

    @property
    def prunable(self) -> int:
        """Number of weights in all sparse layers: the largest number of active weights."""
        return sum(spec.size for spec in self.sparse)

    @property
    def least(self) -> int:
        """Smallest number of active weights: one step of each sparse layer, or the floors of all layers."""
        return max(sum(self.steps), self._least)

    def active_weights(self, budget: Budget) -> int:
        """Returns the number of active weights that a sparsity or a number of parameters allows.

        Raises:
            UsageError: the model cannot meet the budget.
        """
        if not self.sparse and budget.sparsity and self.granularity.density is not None:
            raise UsageError(
                f"--granularity {self.granularity} fits no layer of this model: it takes convolutions and linear "
                f"layers with a multiple of {self.granularity.group} input channels that are not kept dense; give "
                f"another one."
            )
        if not self.sparse and budget.sparsity:
            raise UsageError(
                f"sparsity {float(budget.sparsity):g} cannot be reached: this model has no sparse layer, so the "
                f"highest reachable sparsity is 0; keep fewer layers dense."
            )
        other = count(self.specs)["parameters"] - self.prunable
        total = budget.active_weights(self.prunable, other, len(self.sparse))
        if self.granularity.density is not None and total != sum(self.steps):
            raise self.granularity.refuse(f"a budget of {total:,} active weights")
        if total < sum(self.steps):
            kept = "output of the" if self.granularity.kind == "fan-in" else "one of the"
            what = "weight" if self.granularity.kind == "fan-in" else "kernel"
            raise UsageError(
                f"{total:,} active weights are too few at --granularity {self.granularity}, where every {kept} "
                f"{len(self.sparse)} sparse layers keeps a {what}; allow {self.least:,} or more, or give --granularity "
                f"weight."
            )
        if total < self.least:
            highest = math.floor(1e4 * (1 - self.least / self.prunable)) / 1e4
            raise UsageError(
                f"{total:,} active weights would starve a layer: with a weight for each of their channels the "
                f"{len(self.sparse)} sparse layers need {self.least:,}, so the highest sparsity is "
                f"{highest:g}; allow more weights, or give --allow-starved."
            )
        return total

    @torch.no_grad()
    def counts(self, total: int) -> dict[str, int]:
        """Returns the active weights of each sparse layer by name.

        They sum to `total`, or to the nearest number below that whole steps can make.
        """
        if not self.sparse:
            return {}
        counts = self._spread(total)
        if any(step > 1 for step in self.steps) and self.granularity.density is None:
            whole = whole_units(counts, [spec.size for spec in self.sparse], self.steps)
            counts = [number * step for number, step in zip(whole, self.steps, strict=True)]
        return {spec.name: active for spec, active in zip(self.sparse, counts, strict=True)}

    @torch.no_grad()
    def preview(self, total: int, budget: Budget) -> SparseModel:
        """Returns the model with masks for `total` active weights; the values outside of them are not zeroed.

        Args:
            total: number of active weights.
            budget: the budget that it comes from, for the record in the model's description.
        """
        counts = self.counts(total)
        return SparseModel(self.module, self.specs, dict(self._masks(counts)), self._described(counts, budget))

    @torch.no_grad()
    def to_compact(self, total: int, budget: Budget) -> SparseModel:
        """Returns the model of `apply` in compact storage, with the dense weight and mask of one layer at a time.

        Args:
            total: number of active weights.
            budget: the budget that it comes from, for the record in the model's description.

        Raises:
            UsageError: compact storage cannot hold this module.
        """
        parameters = dict(self.module.named_parameters())
        counts, entries = self.counts(total), []
        for name, mask in self._masks(counts):
            positions, trained = mask.reshape(-1).nonzero().squeeze(1), parameters[name].requires_grad
            entries.append(Entry.of(name, read(parameters[name]), positions, trained=trained))
        install(self.module, CompactStore(entries))
        return SparseModel(self.module, self.specs, {}, self._described(counts, budget))

    def _masks(self, counts: Mapping[str, int]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields name and mask of each sparse layer, one after the other."""
        # A generator of its own, on the CPU: the same seed gives the same masks on every device.
        generator = torch.Generator().manual_seed(self._seed)
        parameters = dict(self.module.named_parameters())
        for name, active in counts.items():
            # Nothing here holds what the mask was chosen by while the mask is used.
            yield (
                name,
                choose(
                    self._ranked(parameters[name], name), active, self.granularity, self._positions_of(name), generator
                ),
            )

    def _described(self, counts: Mapping[str, int], budget: Budget) -> ModelConfig:
        """Returns the model's description with a record of this conversion."""
        conversion = {
            **self.config.conversion,
            **budget.to_record(),
            "distribution": self._distribution,
            "positions": self._positions,
            "granularity": str(self.granularity),
            "seed": self._seed,
            "active_weights": sum(counts.values()),
        }
        return replace(self.config, conversion=conversion)

    def _ranked(self, weight: torch.Tensor, name: str) -> torch.Tensor:
        """Returns what ranks the weights of a layer, in the memory format of the weight."""
        if name not in self._importance:
            return read(weight)
        return torch.empty_like(weight, dtype=torch.float32).copy_(self._importance[name])

    def _positions_of(self, name: str) -> str:
        return "random" if name in self._fresh else self._positions

    def apply(self, total: int, budget: Budget) -> SparseModel:
        """Returns the model with `total` active weights and zeroes all others in the module, which cannot be undone.

        Args:
            total: number of active weights.
            budget: the budget that it comes from, for the record in the model's description.
        """
        model = self.preview(total, budget)
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
    """Makes a module sparse in place, with exactly as many active weights as the budget allows.

    Args:
        module: the network; its inactive weights are set to zero.
        config: description of the model; with an `input_shape`, multiply-adds are counted.
        budget: number of active weights, as a sparsity or a number of parameters.
        distribution: spread over the layers: `uniform`, `erk`, `magnitude` or `lamp`.
        positions: `magnitude` keeps the largest weights of each layer, `random` any.
        granularity: `weight`; `kernel` for convolutions whose kernels are active or inactive as a whole; `fan-in` for
            as many active weights in every output of a layer; or N:M, as in `2:4`. With kernels and fan-in the number
            of active weights is the nearest below that they can make, and N:M fixes it.
        rules: layers that stay dense.
        seed: seed of the random positions.

    Raises:
        UsageError: an option is unknown, the model cannot meet the budget, or a weight is not finite or not real.
    """
    sparsifier = Sparsifier(
        module,
        config,
        distribution=distribution,
        positions=positions,
        granularity=granularity,
        rules=rules,
        seed=seed,
    )
    return sparsifier.apply(sparsifier.active_weights(budget), budget)


def _check_types(module: nn.Module, specs: Mapping[str, LayerSpec]) -> None:
    for name, weight in module.named_parameters():
        if specs[name].role == "sparse" and not weight.is_floating_point():
            raise UsageError(f"weight {name!r} has type {weight.dtype}; only real floating-point ones can be sparse.")
