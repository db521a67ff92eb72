"""Thin dense models: as many parameters as a sparse model has, in fewer channels and without zeros.

The baseline that Mostafa & Wang (ICML 2019, section 4) call thin dense: whether sparsity is worth more than narrowness.
"""

from __future__ import annotations

from dataclasses import replace

from converters.budgets import Fitted, search
from converters.paper_models import MODELS
from converters.sources import fresh, named
from converters.tickets import CHECKSUM, checksum
from converters.widths import WIDTHS
from dsr_tool.errors import UsageError
from dsr_tool.sparse.discover import count
from dsr_tool.sparse.sparsify import Plan
from dsr_tool.sparsity.budget import Budget
from dsr_tool.sparsity.config import ModelConfig

__all__ = ["STEPS", "nearest_width", "thin"]

STEPS = 10_000
"""Widths are tried to the fourth digit; a channel more is a larger step in every network that has one."""


def thin(plan: Plan, budget: Budget, seed: int = 0) -> Fitted:
    """The thin dense model beside a sparse one, with random weights.

    All weights of its sparse layers are active, so that every training method that starts dense takes it.

    Args:
        plan: of the sparse model, with all its options; its module has the architecture's own width.
        budget: of the sparse model, a sparsity or a number of parameters.
        seed: of the weights.

    Raises:
        UsageError: the architecture has no width, the budget is of another kind or out of reach, or not even the
            narrowest model is small enough.
    """
    config = plan.config
    _require_width(config)
    if budget.kind not in ("sparsity", "parameters"):
        raise UsageError(
            f"--budget {budget.show()} does not go with --thin, which matches parameters; give --sparsity or a budget "
            f"such as 1Mparams."
        )
    whole = count(plan.specs)["parameters"]
    target = whole - plan.prunable + sum(plan.counts(plan.exact(budget)).values())
    width = nearest_width(config, whole, target)
    module, narrow = named(
        config.architecture, num_classes=config.num_classes, input_shape=config.input_shape, width=width, seed=seed
    )
    record = {"weights": None, "thin": budget.to_record(), CHECKSUM: checksum(module)}
    dense = Plan(module, replace(narrow, conversion=record), seed=seed)
    limit = Budget(parameters=target, unit="params")
    return Fitted(dense.finish(dense.prunable, limit), limit)


def nearest_width(config: ModelConfig, whole: int, target: int) -> float:
    """The width at which a dense model has as many parameters as a number allows.

    Args:
        config: the model at its full width.
        whole: its parameters.
        target: the most that there may be.

    Returns:
        A factor on the architecture's own width, in (0, 1].

    Raises:
        UsageError: not even the narrowest model is small enough.
    """

    def parameters(step: int) -> int:
        return sum(p.numel() for p in fresh(replace(config, width=step / STEPS)).parameters())

    guess = round(STEPS * (target / whole) ** 0.5)  # most layers are narrower on both sides
    found = search(parameters, 1, STEPS, guess, target, target)
    if found.below is None:
        raise UsageError(
            f"a thin {config.architecture} cannot have {target:,} parameters: the narrowest has {parameters(1):,}; "
            f"give a lower sparsity or a larger budget."
        )
    return found.below[0] / STEPS


def _require_width(config: ModelConfig) -> None:
    known = {"paper": [*MODELS], "torchvision": [*WIDTHS]}.get(config.source, [])
    if config.architecture not in known:
        raise UsageError(
            f"--thin needs an architecture with a width, which {config.architecture} has not; give one of "
            f"{', '.join([*MODELS, *WIDTHS])}."
        )
