"""convert: any source of models to a SparseModel, in one of three ways: to a budget, thin, or from a structure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from converters.budgets import Fitted, fit
from converters.presets import make_rules
from converters.request import NetworkOptions, SelectionOptions, build_network, parse_budget, refuse_with
from converters.thin import fit_thin
from converters.tickets import CHECKSUM, checksum, make_ticket
from dsr_tool.errors import UsageError
from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparse.sparsify import Sparsifier
from dsr_tool.sparsity.budget import Budget

__all__ = ["convert"]


def convert(
    source: str | nn.Module,
    *,
    sparsity: float | str | None = None,
    budget: str | None = None,
    weights: str | None = None,
    num_classes: int | None = None,
    input_size: int | None = None,
    input_shape: Sequence[int] = (),
    distribution: str | None = None,
    positions: str | None = None,
    granularity: str | None = None,
    preset: str | None = None,
    keep_dense: Sequence[str] = (),
    sparsify_patterns: Sequence[str] = (),
    seed: int | None = None,
    thin: bool = False,
    structure: str | Path | None = None,
    init: str | None = None,
    on_fitted: Callable[[Fitted], None] | None = None,
) -> SparseModel:
    """Converts a model to an exact sparse budget.

    Args:
        source: a torchvision model name, a paper's network (`lenet-300-100`, `wrn-22-2`, `wrn-28-2`),
            `module:callable` that returns a module, or a module, which is changed in place.
        sparsity: fraction of zeros among the prunable weights, in [0, 1).
        budget: instead of a sparsity, non-zero parameters of the whole model (`5.1Mparams`), bytes of its archive
            (`12MB`, `12MiB`) or its multiply-adds for one input (`0.8GMACs`).
        weights: for a name, torchvision enum name or state_dict file; random when absent. For others, a state_dict
            file.
        num_classes: for a name, number of outputs of a new head.
        input_size: for a name, side of the square input in pixels.
        input_shape: shape of one input: channels, frames for video, height, width. A callable needs it, a module for
            multiply-adds and exports; a name has its own.
        distribution: `uniform` (default), `erk`, or `magnitude` (default with `weights`).
        positions: which weights of a layer stay active: `magnitude` (default with weights, and for modules and
            callables, which may be trained) or `random` (default for random weights).
        granularity: `weight` (default), or `kernel` for whole kernels of convolutions that are active or inactive; the
            number of active weights is then the nearest from below that whole kernels can make.
        preset: `paper` keeps dense what the paper's code kept dense, and nothing else.
        keep_dense: patterns of weights to keep dense.
        sparsify_patterns: patterns of weights to make sparse against the defaults.
        seed: seed of random weights and random positions; when absent, 0, or with a structure another than it had.
        thin: instead of a sparse model, a dense one with fewer channels that has as many parameters.
        structure: instead of a budget, a model or run folder of the same architecture, whose masks are used unchanged.
        init: with a structure, `fresh` for random weights (default) or `original` for those that its model had before
            it was converted.
        on_fitted: called with the model and the budget that it meets.

    Raises:
        UsageError: a parameter has a value that is not allowed.
        FileError: a file or folder does not exist.
        FormatError: the weights file or the structure cannot be read.
        CheckFailed: the original weights cannot be made again.
    """
    if seed is not None and not 0 <= seed < 1 << 63:
        raise UsageError(f"seed {seed} is not allowed; give a whole number from 0 to 2^63 - 1.")
    # A structure needs to know whether a seed was given; the others take 0.
    network = NetworkOptions(source, weights, num_classes, input_size, input_shape, seed or 0)
    selection = SelectionOptions(preset, keep_dense, sparsify_patterns, distribution, positions, granularity)
    if structure is not None:
        refuse_with(
            "--structure",
            sparsity=sparsity,
            budget=budget,
            weights=weights,
            thin=thin,
            num_classes=num_classes,
            input_size=input_size,
            input_shape=input_shape,
            preset=preset,
            keep_dense=keep_dense,
            sparsify=sparsify_patterns,
            distribution=distribution,
            positions=positions,
            granularity=granularity,
        )
        fitted = make_ticket(source, structure, init or "fresh", seed)
    elif init is not None:
        raise UsageError("--init goes with --structure, the folder whose masks to use; leave it out.")
    elif thin:
        refuse_with("--thin", weights=weights)
        fitted = _to_thin(network, selection, parse_budget(sparsity, budget))
    else:
        fitted = _to_budget(network, selection, parse_budget(sparsity, budget))
    if on_fitted is not None:
        on_fitted(fitted)
    return fitted.model


def _to_budget(network: NetworkOptions, selection: SelectionOptions, budget: Budget) -> Fitted:
    """Converts to a sparse model that meets a budget."""
    return fit(_sparsifier(network, selection), budget)


def _to_thin(network: NetworkOptions, selection: SelectionOptions, budget: Budget) -> Fitted:
    """Converts to the thin dense model that has as many parameters as the sparse one."""
    return fit_thin(_sparsifier(network, selection), budget, network.seed)


def _sparsifier(network: NetworkOptions, selection: SelectionOptions) -> Sparsifier:
    """Builds the network, and prepares its conversion."""
    module, config, may_be_trained = build_network(network)
    trained = network.weights is not None
    record = {
        "preset": selection.preset,
        "keep_dense": list(selection.keep_dense),
        "sparsify": list(selection.sparsify),
        # Taken before anything becomes zero, so that a ticket can check that it has the original weights again.
        CHECKSUM: checksum(module),
    }
    # The largest of random weights are no better than others, so their positions are random by default. Magnitudes may
    # mean something in a network of the user's own, but they are compared between layers only if it is known.
    default_distribution = "magnitude" if trained else "uniform"
    default_positions = "magnitude" if trained or may_be_trained else "random"
    return Sparsifier(
        module,
        replace(config, conversion={**config.conversion, **record}),
        distribution=default_distribution if selection.distribution is None else selection.distribution,
        positions=default_positions if selection.positions is None else selection.positions,
        granularity=selection.granularity or "weight",
        rules=make_rules(
            module,
            preset=selection.preset,
            keep_dense=tuple(selection.keep_dense),
            sparsify=tuple(selection.sparsify),
        ),
        seed=network.seed,
    )
