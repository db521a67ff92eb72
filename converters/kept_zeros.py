"""`--sparsity keep`: a network that is pruned already becomes a sparse model with exactly its zeros as masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

import torch
from torch import nn

from converters.budgets import Fitted
from converters.kept_patterns import kept_pattern
from dsr_tool.errors import UsageError
from dsr_tool.sparse.contract import require_values
from dsr_tool.sparse.discover import Rules, discover
from dsr_tool.sparse.in_file import read
from dsr_tool.sparse.macs import with_macs
from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparsity.budget import Budget
from dsr_tool.sparsity.config import ModelConfig
from dsr_tool.sparsity.granularity import SINGLE, Granularity
from dsr_tool.sparsity.layers import LayerSpec

__all__ = ["KEEP", "few_zeros_warning", "keep", "unused_zeros_warning"]

KEEP = "keep"
"""Value of `--sparsity`, and of `budget` in the record of such a conversion."""

_CHANCE = 0.05
"""Fraction of zeros below which a network counts as not pruned: a dense MobileNetV2, whose published weights had been
rounded, had 2.1 %, and a pruned SqueezeNet 66.6 %."""


@torch.no_grad()
def keep(
    module: nn.Module,
    config: ModelConfig,
    rules: Rules | None = None,
    masks: Mapping[str, torch.Tensor] | None = None,
    seed: int = 0,
    granularity: Granularity | None = None,
) -> Fitted:
    """Makes a sparse model of a pruned network, without changing a value.

    A weight is sparse if it has a zero, however few, and its mask is exactly its non-zeros; depthwise and tiny weights
    as well, since whoever pruned them has decided. A weight without zeros stays dense. A pattern that all masks have is
    recorded as the granularity; see `kept_pattern`.

    Args:
        module: the network with its weights.
        config: description of the model; with an `input_shape`, multiply-adds are counted.
        rules: layers that stay dense although they may have zeros; the defaults for small layers do not apply.
        masks: masks by parameter name that are used instead of the zeros, as `take_masks` returns them.
        seed: seed of random weights, such as those of a new head; for the record.
        granularity: the pattern to record; by default the one that is found.

    Returns:
        The model with the sparsity that it has; its record has `"budget": "keep"`.

    Raises:
        UsageError: no weight has a zero, all are zero, a value is not finite, or a mask lacks the given pattern.
    """
    # A layer without the pattern must be seen as sparse, so that its zeros are not lost.
    rules = replace(rules or Rules(), small_layers=False, granularity=SINGLE)
    specs = discover(module, rules)
    require_values(module)
    parameters = dict(module.named_parameters())
    found = {spec.name: _mask(parameters[spec.name], spec, masks) for spec in specs.values() if spec.role == "sparse"}
    sparse = {name: mask for name, mask in found.items() if not mask.all()}
    dense = "no zeros in the given weights"
    specs = {
        name: replace(spec, role="dense", reason=dense) if name in found and name not in sparse else spec
        for name, spec in specs.items()
    }
    model = SparseModel(
        module, with_macs(module, specs, config.input_shape) if config.input_shape else specs, sparse, config
    )
    active, prunable = model.active_weights, model.prunable_weights
    if not active:
        what = "every prunable weight is zero" if sparse else "none of the prunable weights is zero"
        raise UsageError(
            f"--sparsity keep needs a network that is pruned already, but in this {config.architecture} {what}; give "
            f"--weights of a pruned one, or the fraction of zeros that you want, such as --sparsity 0.5."
        )
    model.apply_masks()  # values outside a mask are zero, but some may be -0
    budget = Budget(sparsity=Fraction(prunable - active, prunable))
    pattern, notes = kept_pattern(module, rules, sparse, granularity)
    record = {"budget": KEEP, **budget.to_record(), "granularity": str(pattern), "seed": seed, "active_weights": active}
    model.config = replace(config, conversion={**config.conversion, **record})
    return Fitted(model, budget, notes=notes)


def few_zeros_warning(model: SparseModel) -> str | None:
    """Returns a sentence if a model of `keep` has so few zeros that its network was hardly pruned."""
    share = _share(model.module, [name for name, spec in model.specs.items() if spec.weight])
    if share >= _CHANCE:
        return None
    return (
        f"only {share:.1%} of the weights are zero, as rounding makes them in dense networks; to prune this one, give "
        f"a fraction, such as --sparsity 0.5."
    )


@torch.no_grad()
def unused_zeros_warning(module: nn.Module, specs: Mapping[str, LayerSpec], sparsity: float) -> str | None:
    """Returns a sentence if a network has many more zeros than a conversion is about to make inactive.

    Args:
        module: the network before its conversion.
        specs: its layers by name.
        sparsity: the fraction of zeros among the prunable weights that was asked for.
    """
    share = _share(module, [name for name, spec in specs.items() if spec.role == "sparse"])
    if share < _CHANCE or sparsity >= share:
        return None
    return (
        f"{share:.1%} of the prunable weights are zero already, and sparsity {sparsity:.4g} counts some of them as "
        f"active; --sparsity keep takes exactly the zeros as masks."
    )


def _mask(weight: torch.Tensor, spec: LayerSpec, masks: Mapping[str, torch.Tensor] | None) -> torch.Tensor:
    """Returns the given mask of a weight, or else its non-zeros, in its memory format."""
    given = (masks or {}).get(spec.name)
    return weight != 0 if given is None else torch.empty_like(weight, dtype=torch.bool).copy_(given)


@torch.no_grad()
def _share(module: nn.Module, names: Sequence[str]) -> float:
    """Returns the fraction of zeros among some weights; 0 for none."""
    parameters = dict(module.named_parameters())
    total = sum(parameters[name].numel() for name in names)
    return 1 - sum(int(torch.count_nonzero(read(parameters[name]))) for name in names) / total if total else 0.0
