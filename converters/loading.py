"""load: a model folder or an archive back to a SparseModel, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from converters import callables
from converters.sources import build_structure
from converters.state_dicts import fill
from dsr_tool.errors import FormatError, UsageError
from dsr_tool.formats.archive import Archive, open_archive
from dsr_tool.graph.compact.record import COMPACTED
from dsr_tool.sparse.discover import discover
from dsr_tool.sparse.folder import read_folder
from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparsity.config import ModelConfig
from dsr_tool.sparsity.layers import LayerSpec
from dsr_tool.sparsity.mask import Mask

__all__ = ["load"]


def load(path: str | Path, module: nn.Module | str | None = None) -> SparseModel:
    """Loads a model folder or an archive, bit for bit as it was saved.

    Args:
        path: a folder that `SparseModel.save`, `dsr-tool convert` or `dsr-tool train` wrote, or a `.dsr` file.
        module: for models that have no name, a fresh module of the same architecture, or `module:callable` that
            returns one.

    Raises:
        FileError: the path does not exist.
        FormatError: the file or folder is damaged, or not for this module.
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
    return _assemble(module or build_structure(saved.config), saved.config, saved.specs, state, masks, str(path))


def _from_archive(archive: Archive, module: nn.Module | None) -> SparseModel:
    # Compaction removed channels, so no module of that architecture has these shapes.
    if COMPACTED in archive.config.conversion:
        raise UsageError(
            f"{str(archive.path)!r} is compacted for inference: its layers are smaller than those of "
            f"{archive.config.architecture}; export without --compact to go back to PyTorch."
        )
    module = module or build_structure(archive.config)
    specs = {name: entry.spec for name, entry in archive.entries.items()}
    state, masks = {}, {}
    for name, tensor in archive:
        array = tensor.to_dense()
        # Weights that were rounded to float16 in the file become float32 in the module; that is exact.
        rounded = array.dtype == np.float16 and specs[name].weight
        state[name] = torch.from_numpy(array.astype(np.float32) if rounded else array)
        if specs[name].role == "sparse":
            masks[name] = tensor.mask
    return _assemble(module, archive.config, specs, state, masks, str(archive.path))


def _assemble(
    module: nn.Module,
    config: ModelConfig,
    specs: dict[str, LayerSpec],
    state: dict[str, torch.Tensor],
    masks: dict[str, Mask],
    where: str,
) -> SparseModel:
    """Fills a module with the tensors of a file, once their names, shapes and dtypes are known to be the module's."""
    # The file is untrusted, and the module may be the user's own: compare everything before anything is assigned.
    own = {name: spec.shape for name, spec in discover(module).items()}
    if {name: tuple(tensor.shape) for name, tensor in state.items()} != own or set(specs) != set(own):
        differing = [
            name for name in {**own, **state} if name not in state or own.get(name) != tuple(state[name].shape)
        ]
        first = differing[0] if differing else min(set(specs) ^ set(own))
        raise FormatError(
            f"{where!r} holds {config.architecture} and disagrees about {first!r} with the {type(module).__name__} to "
            f"be filled; give the model that it was made from, or an intact copy if it is damaged."
        )
    # `fill` assigns tensors, so a wrong dtype would silently become the module's.
    for name, value in module.state_dict().items():
        if value.dtype != state[name].dtype:
            raise FormatError(f"{where!r} holds {name!r} as {state[name].dtype}, but the model has {value.dtype}.")
    fill(module, state)
    active = {name: torch.from_numpy(mask.to_bool()) for name, mask in masks.items()}
    return SparseModel(module, specs, active, config)
