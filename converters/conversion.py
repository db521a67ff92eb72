"""convert: any source to a SparseModel, and back from a folder or an archive."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from converters import callables
from converters.budgets import Fitted, fit
from converters.presets import rules_of
from converters.sources import fresh, named
from converters.state_dicts import fill
from converters.thin import thin as thin_model
from converters.tickets import CHECKSUM, checksum, ticket
from dsr_tool.errors import FormatError, UsageError
from dsr_tool.formats.archive import Archive, open_archive
from dsr_tool.graph.compact.record import COMPACTED
from dsr_tool.sparse.discover import discover
from dsr_tool.sparse.folder import read_folder
from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparse.sparsify import Plan
from dsr_tool.sparsity.budget import Budget
from dsr_tool.sparsity.config import LONGEST_SIDE, ModelConfig
from dsr_tool.sparsity.layers import LayerSpec
from dsr_tool.sparsity.mask import Mask

__all__ = ["convert", "load"]


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
    """Convert a model to an exact sparse budget.

    Args:
        source: a torchvision model name, a paper's network (`lenet-300-100`, `wrn-22-2`, `wrn-28-2`),
            `module:callable` that returns a module, or a module, which is changed in place.
        sparsity: fraction of zeros among the prunable weights, in [0, 1).
        budget: instead of a sparsity, non-zero parameters of the whole model (`5.1Mparams`), bytes of its archive
            (`12MB`, `12MiB`) or its multiply-adds for one input (`0.8GMACs`).
        weights: for a name, torchvision enum name or state_dict file; random when absent. For others, a state_dict
            file.
        num_classes: for a name, outputs of a new head.
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
        seed: of random weights and random positions; when absent, 0, or with a structure another than it had.
        thin: instead of a sparse model, a dense one with fewer channels that has as many parameters.
        structure: instead of a budget, a model or run folder of the same architecture, whose masks are taken as they
            are.
        init: with a structure, `fresh` for random weights (default) or `original` for those that its model had before
            it was converted.
        on_fitted: told what the budget came to.

    Raises:
        UsageError: a parameter with a value that is not allowed.
        FileError: a file or folder is not there.
        FormatError: the weights file or the structure cannot be read.
        CheckFailed: original weights that cannot be made again.
    """
    if seed is not None and not 0 <= seed < 1 << 63:
        raise UsageError(f"seed {seed} is not allowed; give a whole number from 0 to 2^63 - 1.")
    if structure is not None:
        spread = {"distribution": distribution, "positions": positions, "granularity": granularity}
        layers = {"preset": preset, "keep_dense": keep_dense, "sparsify": sparsify_patterns}
        shapes = {"num_classes": num_classes, "input_size": input_size, "input_shape": input_shape}
        given = {"sparsity": sparsity, "budget": budget, "weights": weights, "thin": thin}
        _leave_out("--structure", **given, **shapes, **layers, **spread)
        return _told(ticket(source, structure, init or "fresh", seed), on_fitted)
    if init is not None:
        raise UsageError("--init goes with --structure, the folder whose masks to take; leave it out.")
    if thin:
        _leave_out("--thin", weights=weights)
    wanted, seed = _budget(sparsity, budget), seed or 0
    shape = _shape(source, input_shape, input_size)
    if isinstance(source, str):
        module, config = named(
            source, weights, num_classes=num_classes, input_size=input_size, input_shape=shape, seed=seed
        )
        trained = weights is not None
        own = config.source == "callable"
    else:
        if weights is not None or num_classes is not None:
            raise UsageError("weights, num_classes and input_size go with a model name; a module has its own.")
        module, trained, own = source, False, True
        config = ModelConfig("module", type(source).__name__, 0, shape)
    record = {"preset": preset, "keep_dense": list(keep_dense), "sparsify": list(sparsify_patterns)}
    record[CHECKSUM] = checksum(module)
    plan = Plan(
        module,
        replace(config, conversion={**config.conversion, **record}),
        distribution=("magnitude" if trained else "uniform") if distribution is None else distribution,
        positions=("magnitude" if trained or own else "random") if positions is None else positions,
        granularity=granularity or "weight",
        rules=rules_of(module, preset=preset, keep_dense=tuple(keep_dense), sparsify=tuple(sparsify_patterns)),
        seed=seed,
    )
    return _told(thin_model(plan, wanted, seed) if thin else fit(plan, wanted), on_fitted)


def load(path: str | Path, module: nn.Module | str | None = None) -> SparseModel:
    """Load a model folder or an archive, bit for bit what was saved.

    Args:
        path: a folder that `SparseModel.save`, `dsr-tool convert` or `dsr-tool train` wrote, or a `.dsr` file.
        module: for models that have no name, a fresh module of the same architecture, or
            `module:callable` that returns one.

    Raises:
        FileError: nothing there.
        FormatError: damaged, or not for this module.
        UsageError: the model has no name and no module is given, or the callable fails.
        CheckFailed: weights and masks disagree.
    """
    path = Path(path)
    if isinstance(module, str):
        module = callables.build(module)
    model = _from_archive(open_archive(path), module) if path.is_file() else _from_folder(path, module)
    model.check()
    return model


def _from_folder(path: Path, module: nn.Module | None) -> SparseModel:
    saved = read_folder(path)
    state, masks = saved.weights(), saved.masks()
    return _assemble(module or fresh(saved.config), saved.config, saved.specs, state, masks, str(path))


def _from_archive(archive: Archive, module: nn.Module | None) -> SparseModel:
    if COMPACTED in archive.config.conversion:
        raise UsageError(
            f"{str(archive.path)!r} is compacted for inference: its layers are smaller than those of "
            f"{archive.config.architecture}; export without --compact to go back to PyTorch."
        )
    module = module or fresh(archive.config)
    specs = {name: entry.spec for name, entry in archive.entries.items()}
    state, masks = {}, {}
    for name, tensor in archive:
        array = tensor.to_dense()
        # Weights that were rounded to float16 are float32 again in the module; every float16 is one exactly.
        rounded = array.dtype == np.float16 and specs[name].weight
        state[name] = torch.from_numpy(array.astype(np.float32) if rounded else array)
        if specs[name].role == "sparse":
            masks[name] = tensor.mask
    return _assemble(module, archive.config, specs, state, masks, str(archive.path))


def _told(fitted: Fitted, on_fitted: Callable[[Fitted], None] | None) -> SparseModel:
    if on_fitted is not None:
        on_fitted(fitted)
    return fitted.model


def _leave_out(option: str, **others: Any) -> None:
    """Raise `UsageError` where an option was given that another one leaves no room for."""
    given = [
        name for name, value in others.items() if value is not None and value is not False and value not in ((), [])
    ]
    if given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UsageError(f"{option} leaves nothing for {names} to say; leave that out.")


def _shape(source: str | nn.Module, shape: Sequence[int], size: int | None) -> tuple[int, ...]:
    """The input shape that was asked for, checked; empty for none."""
    shape = tuple(int(n) for n in shape)
    if any(not 1 <= n < LONGEST_SIDE for n in shape):
        raise UsageError(f"--input-shape {list(shape)} is not allowed; give numbers from 1 to {LONGEST_SIDE - 1:,}.")
    if shape and size is not None:
        raise UsageError("--input-size and --input-shape exclude each other; give one of the two.")
    if size is not None and not isinstance(source, str):
        raise UsageError("weights, num_classes and input_size go with a model name; a module has its own.")
    return shape


def _assemble(
    module: nn.Module,
    config: ModelConfig,
    specs: dict[str, LayerSpec],
    state: dict[str, torch.Tensor],
    masks: dict[str, Mask],
    where: str,
) -> SparseModel:
    own = {name: spec.shape for name, spec in discover(module).items()}
    if {name: tuple(tensor.shape) for name, tensor in state.items()} != own or set(specs) != set(own):
        differing = [
            name for name in {**own, **state} if name not in state or own.get(name) != tuple(state[name].shape)
        ]
        first = differing[0] if differing else min(set(specs) ^ set(own))
        raise FormatError(
            f"{where!r} holds {config.architecture} and disagrees about {first!r} with the {type(module).__name__} to "
            f"be filled; give the model that it was made from, or a whole copy if it is damaged."
        )
    for name, value in module.state_dict().items():
        if value.dtype != state[name].dtype:
            raise FormatError(f"{where!r} holds {name!r} as {state[name].dtype}, where the model has {value.dtype}.")
    fill(module, state)
    active = {name: torch.from_numpy(mask.to_bool()) for name, mask in masks.items()}
    return SparseModel(module, specs, active, config)


def _budget(sparsity: float | str | None, budget: str | None) -> Budget:
    if (sparsity is None) == (budget is None):
        raise UsageError("exactly one of --sparsity and --budget is needed; give one of the two.")
    return Budget.parse(budget) if budget is not None else Budget.of_sparsity(sparsity if sparsity is not None else 0)
