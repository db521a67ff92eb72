"""convert: any source to a SparseModel, and back from a folder or an archive."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from converters import callables, torchvision_models
from converters.budgets import Fitted, fit
from converters.presets import preset as preset_rules
from converters.state_dicts import fill
from dsr_tool.core.archive import Archive, open_archive
from dsr_tool.core.budget import Budget
from dsr_tool.core.compaction.record import COMPACTED
from dsr_tool.core.config import LONGEST_SIDE, ModelConfig
from dsr_tool.core.layers import LayerSpec
from dsr_tool.core.mask import Mask
from dsr_tool.errors import FormatError, UsageError
from dsr_tool.sparse.convert import Plan
from dsr_tool.sparse.discover import Rules, discover
from dsr_tool.sparse.folder import read_folder
from dsr_tool.sparse.model import SparseModel

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
    preset: str | None = None,
    keep_dense: Sequence[str] = (),
    sparsify_patterns: Sequence[str] = (),
    seed: int = 0,
    on_fitted: Callable[[Fitted], None] | None = None,
) -> SparseModel:
    """Convert a model to an exact sparse budget.

    Args:
        source: a torchvision model name, `module:callable` that returns a module, or a module, which is changed in
            place.
        sparsity: fraction of zeros among the prunable weights, in [0, 1).
        budget: instead of a sparsity, non-zero parameters of the whole model (`5.1Mparams`), bytes of its archive
            (`12MB`, `12MiB`) or its multiply-adds for one input (`0.8GMACs`).
        weights: for a name, torchvision enum name or state_dict file; random when absent. For a callable, a
            state_dict file.
        num_classes: for a torchvision name, outputs of a new head.
        input_size: for a torchvision name, side of the square input in pixels.
        input_shape: shape of one input: channels, frames for video, height, width. A callable needs it, a module for
            multiply-adds and exports; a torchvision name has its own.
        distribution: `uniform` (default), `erk`, or `magnitude` (default with `weights`).
        positions: which weights of a layer stay active: `magnitude` (default with weights, and for modules and
            callables, which may be trained) or `random` (default for random weights).
        preset: `paper` keeps dense what the paper's code kept dense, and nothing else.
        keep_dense: patterns of weights to keep dense.
        sparsify_patterns: patterns of weights to make sparse against the defaults.
        seed: of random weights and random positions.
        on_fitted: told what the budget came to.

    Raises:
        UsageError: a parameter with a value that is not allowed.
        FormatError: the weights file cannot be read.
    """
    wanted = _budget(sparsity, budget)
    if not 0 <= seed < 1 << 63:
        raise UsageError(f"seed {seed} is not allowed; give a whole number from 0 to 2^63 - 1.")
    shape = _shape(source, input_shape, input_size)
    if isinstance(source, str):
        module, config = _named(source, weights, num_classes, input_size, shape, seed)
        trained = weights is not None
        own = config.source == "callable"
    else:
        if weights is not None or num_classes is not None:
            raise UsageError("weights, num_classes and input_size go with a model name; a module has its own.")
        module, trained, own = source, False, True
        config = ModelConfig("module", type(source).__name__, 0, shape)
    rules = Rules(
        keep_dense=tuple(keep_dense),
        sparsify=tuple(sparsify_patterns),
        preset_dense=preset_rules(preset, module) if preset is not None else {},
        small_layers=preset is None,
    )
    record = {"preset": preset, "keep_dense": list(keep_dense), "sparsify": list(sparsify_patterns)}
    plan = Plan(
        module,
        replace(config, conversion={**config.conversion, **record}),
        distribution=("magnitude" if trained else "uniform") if distribution is None else distribution,
        positions=("magnitude" if trained or own else "random") if positions is None else positions,
        rules=rules,
        seed=seed,
    )
    fitted = fit(plan, wanted)
    if on_fitted is not None:
        on_fitted(fitted)
    return fitted.model


def load(path: str | Path, module: nn.Module | str | None = None) -> SparseModel:
    """Load a model folder or an archive, bit for bit what was saved.

    Args:
        path: a folder that `SparseModel.save`, `dsr-tool convert` or `dsr-tool train` wrote, or a `.dsr` file.
        module: for models that torchvision does not know, a fresh module of the same architecture, or
            `module:callable` that returns one.

    Raises:
        FileError: nothing there.
        FormatError: damaged, or not for this module.
        UsageError: torchvision does not know the model and no module is given, or the callable fails.
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
    return _assemble(module or _fresh(saved.config), saved.config, saved.specs, state, masks, str(path))


def _from_archive(archive: Archive, module: nn.Module | None) -> SparseModel:
    if COMPACTED in archive.config.conversion:
        raise UsageError(
            f"{str(archive.path)!r} is compacted for inference: its layers are smaller than those of "
            f"{archive.config.architecture}; export without --compact to go back to PyTorch."
        )
    module = module or _fresh(archive.config)
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


def _fresh(config: ModelConfig) -> nn.Module:
    if config.source == "callable":
        # The name came out of a file, so that only the user may say that it is to be imported.
        raise UsageError(
            f"the model was made by {config.architecture!r}, code that no file may name to be run; if you trust it, "
            f"say --model {config.architecture} (in Python: load(path, {config.architecture!r}))."
        )
    if config.source != "torchvision":
        raise UsageError(
            f"architecture {config.architecture!r} is not one of torchvision's; give load() a module of that class."
        )
    return torchvision_models.structure(config.architecture, config.num_classes)


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


def _named(
    source: str, weights: str | None, num_classes: int | None, size: int | None, shape: tuple[int, ...], seed: int
) -> tuple[nn.Module, ModelConfig]:
    """The module of a name, torchvision's or `module:callable`."""
    if ":" not in source:
        return torchvision_models.load(
            source, weights, num_classes=num_classes, input_size=size, input_shape=shape, seed=seed
        )
    if num_classes is not None or size is not None:
        raise UsageError(
            f"--num-classes and --input-size go with torchvision's models; let {source!r} make the head that you need, "
            f"and give --input-shape."
        )
    if not shape:
        raise UsageError(f"{source!r} needs --input-shape, the shape of one input, such as 3,224,224.")
    return callables.load(source, weights, input_shape=shape, seed=seed)


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
