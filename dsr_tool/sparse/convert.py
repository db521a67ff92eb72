"""From a module to a SparseModel: layers, exact counts, and which weights are active."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from dsr_tool.core.budget import Budget
from dsr_tool.core.config import ModelConfig
from dsr_tool.core.distribution import DISTRIBUTIONS, by_magnitude, erk, uniform
from dsr_tool.core.layers import LayerSpec
from dsr_tool.errors import UsageError, unknown_name
from dsr_tool.sparse.discover import Rules, count, discover
from dsr_tool.sparse.macs import with_macs
from dsr_tool.sparse.model import SparseModel

__all__ = ["POSITIONS", "sparsify"]

POSITIONS = ("magnitude", "random")


@torch.no_grad()
def sparsify(
    module: nn.Module,
    config: ModelConfig,
    budget: Budget,
    *,
    distribution: str = "uniform",
    positions: str = "magnitude",
    rules: Rules | None = None,
    seed: int = 0,
) -> SparseModel:
    """Make a module sparse in place: exactly as many active weights as the budget says.

    Args:
        module: the network; weights that become inactive are set to zero.
        config: what it is; with an `input_shape`, multiply-adds are counted.
        budget: how many weights may be active.
        distribution: `uniform`, `erk` or `magnitude`.
        positions: `magnitude` keeps the largest weights of each layer, `random` any.
        rules: which layers stay dense.
        seed: of the random positions.

    Raises:
        UsageError: an option nobody knows, a budget nobody can meet, or weights that are not float.
    """
    if distribution not in DISTRIBUTIONS:
        raise unknown_name("distribution", distribution, DISTRIBUTIONS)
    if positions not in POSITIONS:
        raise unknown_name("positions", positions, POSITIONS)
    specs = discover(module, rules)
    totals = count(specs)
    layers, prunable = totals["sparse_layers"], totals["prunable"]
    if not prunable and budget.sparsity:
        raise UsageError(
            f"sparsity {float(budget.sparsity):g} cannot be reached: no layer of this model is left to be sparse, "
            f"so the highest reachable sparsity is 0; keep fewer layers dense."
        )
    total = budget.active_weights(prunable, totals["parameters"] - prunable, layers)
    if config.input_shape:
        specs = with_macs(module, specs, config.input_shape)
    _check_values(module, specs)
    model = SparseModel(module, specs, {}, config)
    counts = _counts(model, total, distribution)
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(module.named_parameters())
    for name, active in counts.items():
        model.masks[name] = _choose(parameters[name], active, positions, generator)
    model.apply_masks()
    conversion = {
        **config.conversion,
        **_budget_for_the_record(budget),
        "distribution": distribution,
        "positions": positions,
        "seed": seed,
        "active_weights": total,
    }
    model.config = replace(config, conversion=conversion)
    return model


def _check_values(module: nn.Module, specs: Mapping[str, LayerSpec]) -> None:
    for name, weight in module.named_parameters():
        if specs[name].role != "sparse":
            continue
        if not weight.is_floating_point():
            raise UsageError(f"weight {name!r} is of {weight.dtype}; only real floating-point weights can be sparse.")
        if not torch.isfinite(weight).all():
            raise UsageError(f"weight {name!r} holds values that are not finite; take weights from before that.")


def _counts(model: SparseModel, total: int, distribution: str) -> dict[str, int]:
    """Active weights per sparse layer."""
    sparse: list[LayerSpec] = [spec for spec in model.specs.values() if spec.role == "sparse"]
    shapes = [spec.shape for spec in sparse]
    if not sparse:
        return {}
    if distribution == "magnitude":
        parameters = dict(model.module.named_parameters())
        weights = [parameters[spec.name].detach().float().cpu().numpy() for spec in sparse]
        counts = by_magnitude(total, weights)
    else:
        counts = (uniform if distribution == "uniform" else erk)(total, shapes)
    return {spec.name: active for spec, active in zip(sparse, counts, strict=True)}


def _choose(weight: torch.Tensor, active: int, positions: str, generator: torch.Generator) -> torch.Tensor:
    """A mask with exactly `active` entries, in the memory format of the weight."""
    if positions == "random":
        chosen = torch.randperm(weight.numel(), generator=generator)[:active]
    else:
        magnitude = weight.detach().float().abs().reshape(-1).cpu().numpy()
        chosen = torch.from_numpy(_largest(magnitude, active))
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    mask[chosen] = True
    return torch.empty_like(weight, dtype=torch.bool).copy_(mask.reshape(weight.shape))


def _largest(magnitude: np.ndarray, active: int) -> np.ndarray:
    """Positions of the largest entries, exactly `active`; of equal ones the earlier."""
    if active >= magnitude.size:
        return np.arange(magnitude.size)
    cut = np.partition(magnitude, magnitude.size - active)[magnitude.size - active]
    above = np.flatnonzero(magnitude > cut)
    return np.concatenate([above, np.flatnonzero(magnitude == cut)[: active - len(above)]])


def _budget_for_the_record(budget: Budget) -> dict[str, float | int]:
    if budget.sparsity is not None:
        return {"sparsity": float(budget.sparsity)}
    return {"budget_parameters": budget.parameters or 0}
