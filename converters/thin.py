"""Thin dense models: as many parameters as a sparse model has, in fewer channels and without zeros.

Mostafa & Wang (ICML 2019, section 4) call this baseline thin dense. It shows whether a sparse network is better than a
narrow one of the same size.
"""

from __future__ import annotations

from dataclasses import replace

from converters.budgets import Fitted
from converters.search import search
from converters.sources import SOURCES, build_structure, load_network
from converters.tickets import CHECKSUM, checksum
from dsr_tool.errors import UsageError
from dsr_tool.sparse.discover import count
from dsr_tool.sparse.sparsify import Sparsifier
from dsr_tool.sparsity.budget import Budget
from dsr_tool.sparsity.config import ModelConfig

__all__ = ["STEPS", "fit_thin", "nearest_width"]

STEPS = 10_000
"""Steps between width 0 and 1. One more channel is a larger step than 1e-4 in every network with a width."""


def fit_thin(sparsifier: Sparsifier, budget: Budget, seed: int = 0) -> Fitted:
    """Returns the thin dense model that has as many parameters as a sparse one, with random weights.

    All weights of its sparse layers are active, so that every training method that starts dense can train it.

    Args:
        sparsifier: the sparse model with all its options, not applied; its module has the architecture's own width.
        budget: budget of the sparse model, a sparsity or a number of parameters.
        seed: seed of the weights.

    Raises:
        UsageError: the architecture has no width, the budget is of another kind or out of reach, or even the narrowest
            model is too large.
    """
    config = sparsifier.config
    _require_width(config)
    if budget.kind not in ("sparsity", "parameters"):
        raise UsageError(
            f"--budget {budget.show()} does not go with --thin, which matches parameters; give --sparsity or a budget "
            f"such as 1Mparams."
        )
    parameters = count(sparsifier.specs)["parameters"]
    # The sparse model's own counts, since whole kernels and the distribution decide them.
    target = parameters - sparsifier.prunable + sum(sparsifier.counts(sparsifier.active_weights(budget)).values())
    width = nearest_width(config, parameters, target)
    module, narrow = load_network(
        config.architecture, num_classes=config.num_classes, input_shape=config.input_shape, width=width, seed=seed
    )
    # A dense model is a sparse one with all weights active, so that every command can read it.
    record = {"weights": None, "thin": budget.to_record(), CHECKSUM: checksum(module)}
    dense = Sparsifier(module, replace(narrow, conversion=record), seed=seed)
    limit = Budget(parameters=target, unit="params")
    return Fitted(dense.apply(dense.prunable, limit), limit)


def nearest_width(config: ModelConfig, parameters: int, target: int) -> float:
    """Returns the largest width at which a dense model has at most `target` parameters.

    Args:
        config: description of the model at its full width.
        parameters: its number of parameters.
        target: the largest number of parameters that is allowed.

    Returns:
        A factor on the architecture's own width, in (0, 1], a multiple of 1 / `STEPS`.

    Raises:
        UsageError: even the narrowest model is too large.
    """

    def size(step: int) -> int:
        return sum(p.numel() for p in build_structure(replace(config, width=step / STEPS)).parameters())

    # Most layers are narrower on both sides, so parameters fall with the square of the width.
    guess = round(STEPS * (target / parameters) ** 0.5)
    found = search(size, 1, STEPS, guess, target, target)
    if found.below is None:
        raise UsageError(
            f"a thin {config.architecture} cannot have {target:,} parameters: the narrowest has {size(1):,}; give a "
            f"lower sparsity or a larger budget."
        )
    return found.below[0] / STEPS


def _require_width(config: ModelConfig) -> None:
    source = SOURCES.get(config.source)
    if source is None or config.architecture not in source.widths:
        known = ", ".join(name for other in SOURCES.values() for name in other.widths)
        raise UsageError(
            f"--thin needs an architecture that can be built narrower, which {config.architecture} cannot; give one of "
            f"{known}."
        )
