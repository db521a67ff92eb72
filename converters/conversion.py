"""convert: any source of models to a SparseModel, to a budget, thin, with the zeros it has, or from a structure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import torch
from torch import nn

from converters.budgets import Fitted
from converters.calibration import OUTPUT, calibrated
from converters.kept_zeros import KEEP, few_zeros_warning, keep
from converters.prepared import Prepared, prepare
from converters.pretrained import density_file, make_sparsifier, without_data
from converters.request import CalibrationOptions, NetworkOptions, SelectionOptions, parse_budget, refuse_with
from converters.thin import fit_thin
from converters.tickets import make_ticket
from dsr_tool.calibrate.pictures import DEFAULT_COUNT
from dsr_tool.errors import UsageError, unknown_name
from dsr_tool.sparse.computed import require_zeros
from dsr_tool.sparse.model import STORAGES, SparseModel
from dsr_tool.sparsity.budget import Budget
from dsr_tool.sparsity.density_file import PREFIX, DensityFile

__all__ = ["AUTO", "convert"]

AUTO = "auto"
"""Value of `storage` that leaves the model as the conversion made it."""


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
    calibrate: str | Path | torch.Tensor | Iterable[object] | None = None,
    calibration_images: int | None = None,
    allow_starved: bool = False,
    storage: str = "masked",
    on_fitted: Callable[[Fitted], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> SparseModel:
    """Converts a model to an exact sparse budget.

    Args:
        source: a torchvision model name, a paper's network (`lenet-300-100`, `wrn-22-2`, `wrn-28-2`),
            `module:callable` that returns a module, or a module, which is changed in place.
        sparsity: fraction of zeros among the prunable weights, in [0, 1); or `keep` to take the zeros that a pruned
            network has, and the masks of `torch.nn.utils.prune`, as they are.
        budget: instead of a sparsity, non-zero parameters of the whole model (`5.1Mparams`), bytes of its archive
            (`12MB`, `12MiB`) or its multiply-adds for one input (`0.8GMACs`).
        weights: for a name, torchvision enum name or state_dict file; random when absent. For others, a state_dict
            file.
        num_classes: for a name, number of outputs of a new head.
        input_size: for a name, side of the square input in pixels.
        input_shape: shape of one input: channels, frames for video, height, width. A callable needs it, a module for
            multiply-adds and exports; a name has its own.
        distribution: `uniform` (default), `erk`, `lamp` (default with `weights`), `magnitude`, `output` (default with
            `calibrate`, and only there), or `file:FILE.csv` with the density of each layer, which needs no budget.
        positions: which weights of a layer stay active: `magnitude` (default with weights, and for modules and
            callables, which may be trained) or `random` (default for random weights).
        granularity: `weight` (default); `kernel` for whole kernels of convolutions that are active or inactive;
            `fan-in` for as many active weights in every output of a layer; or N:M, such as `2:4`, for N active weights
            in every group of M input channels. With kernels and fan-in the number of active weights is the nearest from
            below that they can make. N:M gives every sparse layer the density N/M and needs no budget. With `keep`, the
            pattern that the zeros have is recorded; `weight` records none, any other must be theirs.
        preset: `paper` keeps dense what the paper's code kept dense, and nothing else.
        keep_dense: patterns of weights to keep dense.
        sparsify_patterns: patterns of weights to make sparse against the defaults.
        seed: seed of random weights and random positions; when absent, 0, or with a structure another than it had.
        thin: instead of a sparse model, a dense one with fewer channels that has as many parameters.
        structure: instead of a budget, a model or run folder of the same architecture, whose masks are used unchanged.
        init: with a structure, `fresh` for random weights (default) or `original` for those that its model had before
            it was converted.
        calibrate: unlabelled pictures, by which layer budgets, masks and values are chosen so that the outputs of the
            network change least: a folder, a tensor of shape (N, *input_shape), or a loader.
        calibration_images: largest number of these pictures; default 256.
        allow_starved: whether layers may be left with so few weights that they carry no signal.
        storage: how the model holds its sparse weights, see `SparseModel`; or `auto` for a model that is only saved:
            however the conversion made it.
        on_fitted: called with the model and the budget that it meets.
        on_progress: receives the steps of the calibration that are done, and all of them.

    Raises:
        UsageError: a parameter has a value that is not allowed.
        FileError: a file or folder does not exist.
        FormatError: the weights file or the structure cannot be read.
        CheckFailed: the original weights cannot be made again, or the network computes with a denser function of its
            sparse weights.
    """
    if storage not in (*STORAGES, AUTO):
        raise unknown_name("storage", storage, (*STORAGES, AUTO))
    if seed is not None and not 0 <= seed < 1 << 63:
        raise UsageError(f"seed {seed} is not allowed; give a whole number from 0 to 2^63 - 1.")
    # A structure needs to know whether a seed was given; the others take 0.
    network = NetworkOptions(source, weights, num_classes, input_size, input_shape, seed or 0)
    selection = SelectionOptions(
        preset, keep_dense, sparsify_patterns, distribution, positions, granularity, seed or 0, allow_starved
    )
    how = {"distribution": distribution, "positions": positions, "granularity": granularity}
    care = {
        "calibrate": calibrate is not None,
        "calibration_images": calibration_images,
        "allow_starved": allow_starved,
    }
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
            **how,
            **care,
        )
        fitted = make_ticket(source, structure, init or "fresh", seed)
    elif init is not None:
        raise UsageError("--init goes with --structure, the folder whose masks to use; leave it out.")
    elif thin:
        refuse_with("--thin", weights=weights, **care)
        fitted = _to_thin(network, selection, parse_budget(sparsity, budget, selection.pattern))
    elif sparsity == KEEP:
        others = {name: value for name, value in how.items() if name != "granularity"}
        refuse_with("--sparsity keep", budget=budget, sparsify=sparsify_patterns, **others, **care)
        fitted = _with_its_zeros(network, selection)
    else:
        if calibrate is None and calibration_images is not None:
            raise UsageError("--calibration-images goes with --calibrate, the folder of pictures; give that too.")
        if isinstance(calibrate, str) and not calibrate:
            raise UsageError("--calibrate is empty; give a folder of pictures.")  # not the current one
        images = DEFAULT_COUNT if calibration_images is None else calibration_images
        told = on_progress or (lambda _, __: None)
        options = None if calibrate is None else CalibrationOptions(calibrate, images, told)
        fitted = _to_budget(network, selection, sparsity, budget, options)
    # A network that is compact already was pruned weight by weight, since it computes with nothing but its weights.
    if fitted.model.storage == "masked":
        require_zeros(fitted.model)
    if on_fitted is not None:
        on_fitted(fitted)
    return fitted.model if storage == AUTO else fitted.model.to_storage(storage)


def _to_budget(
    network: NetworkOptions,
    selection: SelectionOptions,
    sparsity: float | str | None,
    budget: str | None,
    options: CalibrationOptions | None,
) -> Fitted:
    """Converts to a sparse model that meets a budget, with pictures or without."""
    pattern = selection.pattern
    if pattern.density is not None and selection.distribution not in (None, "uniform"):
        raise pattern.refuse(f"--distribution {selection.distribution}")
    # A file of densities is a budget too. Any other is checked before the network is built, which may take seconds.
    from_file = sparsity is None and budget is None and (selection.distribution or "").startswith(PREFIX)
    given = None if from_file else parse_budget(sparsity, budget, pattern)
    if options is None and selection.distribution == OUTPUT:
        raise UsageError("--distribution output needs --calibrate, a folder of pictures; give that too.")
    # Pictures run through the dense network, and sizes in bytes are those of archives of the whole model.
    in_file = options is None and (given is None or given.kind != "bytes")
    prepared = prepare(network, selection, in_file=in_file)
    if options is not None and not (prepared.trained or prepared.may_be_trained):
        raise UsageError("--calibrate keeps what trained weights do, and these are random; give --weights.")
    file = density_file(prepared, selection)
    own = Budget(sparsity=1 - Fraction(file.total, sum(file.sizes) or 1)) if file else None
    wanted = given or own or parse_budget(sparsity, budget, pattern)
    _require_reachable(prepared, selection, wanted, file, pictures=options is not None)
    if options is None:
        return without_data(prepared, selection, wanted, file)
    return calibrated(prepared, selection, wanted, file, options)


def _require_reachable(
    prepared: Prepared, selection: SelectionOptions, wanted: Budget, file: DensityFile | None, *, pictures: bool
) -> None:
    """Raises `UsageError` for an unknown option and for a budget that no conversion meets, before either takes long.

    Budgets in bytes and multiply-adds depend on the masks; they are checked when those are known.
    """
    if selection.distribution == OUTPUT:
        selection = replace(selection, distribution=None)
    # The floors of LAMP are those of layer budgets by pictures as well.
    default = "lamp" if pictures else None
    sparsifier = make_sparsifier(prepared, selection, distribution=default, spread=file.spread if file else None)
    if wanted.kind in ("sparsity", "parameters"):
        sparsifier.active_weights(wanted)


def _to_thin(network: NetworkOptions, selection: SelectionOptions, budget: Budget) -> Fitted:
    """Converts to the thin dense model that has as many parameters as the sparse one."""
    return fit_thin(make_sparsifier(prepare(network, selection), selection), budget, network.seed)


def _with_its_zeros(network: NetworkOptions, selection: SelectionOptions) -> Fitted:
    """Converts a pruned network to a sparse model with the zeros that it has."""
    prepared = prepare(network, selection)
    asked = None if selection.granularity is None else selection.pattern
    fitted = keep(prepared.module, prepared.config, prepared.rules, prepared.masks, selection.seed, asked)
    warning = few_zeros_warning(fitted.model)
    notes = (*prepared.notes, *fitted.notes)
    return replace(fitted, notes=notes, warnings=(warning,) if warning else ())
