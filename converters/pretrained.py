"""Conversion to a budget: what is known about the weights decides the layer budgets, and what is corrected after."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial

import torch

from converters.archive_size import captured
from converters.budgets import Fitted, solve, trim
from converters.kept_zeros import unused_zeros_warning
from converters.prepared import Prepared
from converters.request import SelectionOptions
from dsr_tool.calibrate.importance import data_free_importance
from dsr_tool.calibrate.moments import InputMoments, input_moments, untrained
from dsr_tool.calibrate.norms import correct_norms
from dsr_tool.errors import CheckFailed, UsageError, first_few
from dsr_tool.graph.ir import Graph
from dsr_tool.sparse.discover import discover
from dsr_tool.sparse.feeding import tensor_form
from dsr_tool.sparse.in_file import Made, bring_in, read
from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparse.sparsify import Sparsifier
from dsr_tool.sparsity.budget import Budget
from dsr_tool.sparsity.density_file import PREFIX, DensityFile, parse_spec, read_densities
from dsr_tool.sparsity.starved import silent_layers, starved_layers

__all__ = ["budget_notes", "check_signal", "density_file", "known_moments", "make_sparsifier", "without_data"]

_NAMED = 4
"""Largest number of starved layers that a warning names."""
_BY_VALUE_ALONE = ("uniform", "erk", "magnitude")
"""Distributions that rank weights by |w|, as their sources do."""

Spread = Callable[[int], list[int]]
"""Number of active weights of each sparse layer for a total."""


def without_data(prepared: Prepared, selection: SelectionOptions, budget: Budget, file: DensityFile | None) -> Fitted:
    """Converts to a sparse model that meets a budget, without any data.

    Of trained weights the largest stay, layers get their budgets by LAMP scores, and the norms after the layers are
    corrected for what the masks took.

    Args:
        prepared: the dense network, which becomes sparse.
        selection: the options of `convert` that say which weights are active.
        budget: the budget.
        file: densities of the layers; None for a distribution.

    Raises:
        UsageError, CheckFailed: see `convert`.
    """
    # Captured once for all that reads it, since a capture takes seconds.
    graph = captured(prepared.module, prepared.config.input_shape) if budget.kind == "bytes" else None
    # With all weights active, nothing is ranked or corrected.
    moments = known_moments(prepared, graph) if prepared.trained and budget.sparsity != 0 else ""
    sparsifier = make_sparsifier(prepared, selection, moments, spread=file.spread if file else None)
    total, nbytes = solve(sparsifier, budget, graph)
    # Before anything becomes zero.
    zeros = unused_zeros_warning(prepared.module, sparsifier.specs, 1 - total / max(sparsifier.prunable, 1))
    known = moments if isinstance(moments, InputMoments) and total < sparsifier.prunable else None
    dense = _dense_weights(prepared, sparsifier) if known is not None else {}
    notes = budget_notes(prepared, file, sparsifier, total)
    if prepared.in_file:
        model = sparsifier.to_compact(total, budget)
        bring_in(model.module)  # what stays dense
    else:
        model = sparsifier.apply(total, budget)
    if known is not None:
        corrected = correct_norms(model, dense, known)
        notes += _told(corrected.names, corrected.left_alone)
        # Corrected norms are coded in another number of bytes.
        nbytes = trim(model, budget.amount, graph) if nbytes is not None else None
    elif isinstance(moments, str) and moments:
        notes.append(f"norms were left alone: {moments}")
    starved = check_signal(model, selection) if prepared.trained else []
    return Fitted(model, budget, nbytes, tuple(notes), (*([zeros] if zeros else []), *starved))


def _dense_weights(prepared: Prepared, sparsifier: Sparsifier) -> Mapping[str, torch.Tensor]:
    """Returns the weights of the sparse layers as they are now: copies, or what reads them from their file."""
    parameters = {spec.name: prepared.module.get_parameter(spec.name) for spec in sparsifier.sparse}
    if prepared.in_file:
        return Made({name: partial(read, parameter) for name, parameter in parameters.items()})
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def check_signal(model: SparseModel, selection: SelectionOptions) -> list[str]:
    """Returns a warning if layers of a converted network keep very few weights.

    Raises:
        CheckFailed: a layer carries no signal, and that was not allowed.
    """
    tensors = model.tensors()
    silent = silent_layers(model.specs, {name: tensors[name] for name in model.masks})
    if silent and not selection.allow_starved:
        name, found = next(iter(silent.items()))
        more = f", nor would {len(silent) - 1} more" if len(silent) > 1 else ""
        raise CheckFailed(
            f"layer {name!r} would carry no signal ({found}){more}, so what the network learned would be lost; give a "
            f"lower sparsity, --distribution lamp or --calibrate, or --allow-starved to convert it all the same."
        )
    starved = starved_layers(model.specs, model.counts)
    if not starved:
        return []
    named = "; ".join(f"{name} ({found})" for name, found in list(starved.items())[:_NAMED])
    more = f"; and {len(starved) - _NAMED} more" if len(starved) > _NAMED else ""
    layers = "1 layer keeps" if len(starved) == 1 else f"{len(starved)} layers keep"
    return [f"{layers} very few weights: {named}{more}."]


def budget_notes(prepared: Prepared, file: DensityFile | None, sparsifier: Sparsifier, total: int) -> list[str]:
    """Returns what is known about a network before its weights are chosen, and what its densities come from."""
    densities = [f"densities: {file.note}"] if file else []
    return [*prepared.notes, *densities, *_pattern_notes(sparsifier, total)]


def _pattern_notes(sparsifier: Sparsifier, total: int) -> list[str]:
    """Returns what the granularity means for the masks, and by how much it changes a total of active weights."""
    granularity = sparsifier.granularity
    if granularity.kind == "weight":
        return []
    meaning = {
        "kernel": "a kernel of a convolution is active as a whole or not at all",
        "fan-in": "every output of a layer has as many active weights as its other outputs",
        "N:M": f"{granularity.kept} active in every {granularity.group} consecutive input channels, for each output "
        f"and each position of a kernel",
    }[granularity.kind]
    active = sum(sparsifier.counts(total).values())
    less = f"; so {active:,} are active, {total - active:,} below the {total:,} allowed" if active < total else ""
    return [f"granularity {granularity}: {meaning}{less}"]


def density_file(prepared: Prepared, selection: SelectionOptions) -> DensityFile | None:
    """Returns the file of densities that `--distribution` names; None for any other distribution."""
    if selection.distribution is None or not selection.distribution.startswith(PREFIX):
        return None
    path, column = parse_spec(selection.distribution)
    return read_densities(path, column, discover(prepared.module, prepared.rules))


def make_sparsifier(
    prepared: Prepared,
    selection: SelectionOptions,
    moments: InputMoments | str = "",
    *,
    distribution: str | None = None,
    spread: Spread | None = None,
) -> Sparsifier:
    """Returns the sparsifier of a prepared network, with the defaults that suit its weights.

    Args:
        prepared: the dense network.
        selection: the options of `convert` that say which weights are active.
        moments: what is known of the layers' inputs, by which weights are ranked unless |w| was asked for.
        distribution: name of the distribution if none is given; by default what suits weights without data.
        spread: layer budgets that replace those of a distribution.
    """
    # The largest of random weights are no better than others, so their positions are random by default. Magnitudes may
    # mean something in a network of the user's own, but they are compared between layers only if it is known.
    default = distribution or ("lamp" if prepared.trained else "uniform")
    default_positions = "magnitude" if prepared.trained or prepared.may_be_trained else "random"
    name = default if selection.distribution is None else selection.distribution
    known = moments if isinstance(moments, InputMoments) and name not in _BY_VALUE_ALONE else None
    return Sparsifier(
        prepared.module,
        prepared.config,
        distribution=name,
        positions=default_positions if selection.positions is None else selection.positions,
        granularity=selection.granularity or "weight",
        rules=prepared.rules,
        seed=selection.seed,
        fresh=prepared.fresh,
        allow_starved=selection.allow_starved,
        spread=spread,
        importance=data_free_importance(prepared.module, known) if known else None,
        shares=known.paths.shares() if known else None,
    )


def known_moments(prepared: Prepared, graph: Graph | None = None) -> InputMoments | str:
    """Returns the moments of the layers' inputs, or else the reason why there are none.

    Args:
        prepared: the dense network.
        graph: its graph; captured here when absent.
    """
    if not prepared.config.input_shape:
        return "the shape of the network's input is not known"
    state = prepared.module.state_dict()
    norms = [name for name in state if name.endswith("running_mean")]
    if norms and len(untrained(state)) == len(norms):
        return "their statistics are those of a new network (mean 0 and variance 1), so they say nothing"
    try:
        return input_moments(tensor_form(prepared.module), prepared.config.input_shape, graph)
    except UsageError as error:
        return str(error)


def _told(corrected: list[str], left_alone: Mapping[str, str]) -> list[str]:
    """Returns what was done about the norms, in words."""
    layers = len(corrected) + len(left_alone)
    notes = [f"norms and biases corrected for what the masks took: behind {len(corrected)} of {layers} sparse layers"]
    by_reason: dict[str, list[str]] = defaultdict(list)
    for name, reason in left_alone.items():
        by_reason[reason].append(name)
    notes += [f"left alone behind {len(names)} ({first_few(names)}): {reason}" for reason, names in by_reason.items()]
    return notes
