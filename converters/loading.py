"""load: a model folder or an archive back to a SparseModel, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from converters import callables
from converters.plain import make_plain
from converters.sources import build_structure
from converters.state_dicts import fill
from dsr_tool.errors import CheckFailed, FormatError, UsageError, unknown_name
from dsr_tool.formats.archive import Archive, open_archive
from dsr_tool.graph.compact.record import COMPACTED
from dsr_tool.sparse.compact.change import held_state
from dsr_tool.sparse.compact.modules import install
from dsr_tool.sparse.compact.store import CompactStore, Entry
from dsr_tool.sparse.contract import is_extra_state
from dsr_tool.sparse.discover import discover
from dsr_tool.sparse.folder import read_folder
from dsr_tool.sparse.model import STORAGES, SparseModel
from dsr_tool.sparsity.config import ModelConfig
from dsr_tool.sparsity.layers import LayerSpec
from dsr_tool.sparsity.mask import Mask

__all__ = ["load"]


_Items = Iterator[tuple[str, torch.Tensor, Mask | None]]
"""Name, dense tensor and mask of each entry of a state_dict, read one at a time; no mask for dense entries."""


def load(path: str | Path, module: nn.Module | str | None = None, *, storage: str = "masked") -> SparseModel:
    """Loads a model folder or an archive, bit for bit as it was saved.

    Args:
        path: a folder that `SparseModel.save`, `dsr-tool convert` or `dsr-tool train` wrote, or a `.dsr` file.
        module: for models that have no name, a fresh module of the same architecture, or `module:callable` that
            returns one.
        storage: how to hold sparse weights, see `SparseModel`. With `compact`, one dense weight at a time is in memory.

    Raises:
        FileError: the path does not exist.
        FormatError: the file or folder is damaged, or not for this module.
        UsageError: the model has no name and no module is given, the callable fails, or there is no such storage.
        CheckFailed: weights and masks disagree.
    """
    if storage not in STORAGES:
        raise unknown_name("storage", storage, STORAGES)
    path = Path(path)
    if isinstance(module, str):
        module = callables.build(module)
    if path.is_file():
        archive = open_archive(path)
        specs = {name: entry.spec for name, entry in archive.entries.items()}
        config, items = archive.config, _of_archive(archive, specs)
    else:
        folder = read_folder(path)
        config, specs, items = folder.config, folder.specs, folder.entries()
    given = build_structure(config) if module is None else make_plain(module).module
    filling = _Filling(given, config, specs, str(path))
    for name, weight, mask in items:
        filling.add(name, weight, mask, compact=storage == "compact")
    model = filling.finish()
    model.check()
    return model


def _of_archive(archive: Archive, specs: Mapping[str, LayerSpec]) -> _Items:
    # Compaction removed channels, so no module of that architecture has these shapes.
    if COMPACTED in archive.config.conversion:
        raise UsageError(
            f"{str(archive.path)!r} is compacted for inference: its layers are smaller than those of "
            f"{archive.config.architecture}; export without --compact to go back to PyTorch."
        )
    for name, tensor in archive:
        array = tensor.to_dense()
        # Weights that were rounded to float16 in the file become float32 in the module; that is exact.
        rounded = array.dtype == np.float16 and specs[name].weight
        weight = torch.from_numpy(array.astype(np.float32) if rounded else array)
        yield name, weight, tensor.mask if specs[name].role == "sparse" else None


@dataclass
class _Filling:
    """A module that gets the tensors of a file, once their names, shapes and dtypes are known to be the module's.

    Attributes:
        module: the module to fill, perhaps on the meta device.
        config: description of the model.
        specs: one `LayerSpec` per state_dict entry, by name.
        where: path of the file or folder, for messages.
        found: type and shape of each tensor that was added.
        state: dense tensors.
        masks: masks of those that are sparse in masked storage.
        entries: sparse weights in compact storage.
    """

    module: nn.Module
    config: ModelConfig
    specs: Mapping[str, LayerSpec]
    where: str
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = field(default_factory=dict)
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    masks: dict[str, torch.Tensor] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)

    def add(self, name: str, weight: torch.Tensor, mask: Mask | None, *, compact: bool) -> None:
        """Adds one tensor; in compact storage, of a sparse weight no more than the active values stay."""
        self.found[name] = weight.dtype, tuple(weight.shape)
        if mask is None or tuple(weight.shape) != mask.shape:  # another shape is reported at the end
            self.state[name] = _aligned(weight)
        elif not compact:
            self.state[name], self.masks[name] = _aligned(weight), torch.from_numpy(mask.to_bool())
        else:
            entry = Entry.of(name, weight, torch.from_numpy(mask.positions))
            outside = int(torch.count_nonzero(weight)) - int(torch.count_nonzero(entry.values))
            if outside:
                raise CheckFailed(
                    f"weight {name!r} has {outside:,} non-zero values outside its mask; the file is damaged."
                )
            self.entries.append(entry)

    def finish(self) -> SparseModel:
        """Fills the module."""
        # The file is untrusted, and the module may be the user's own: compare everything before anything is assigned.
        self._require_same()
        parameters = dict(self.module.named_parameters())
        # Layers in the order of the network, which methods and checkpoints count on; files have an order of their own.
        order = {name: number for number, name in enumerate(self.specs)}
        if self.entries:
            entries = sorted(self.entries, key=lambda entry: order[entry.name])
            trained = [replace(entry, trained=parameters[entry.name].requires_grad) for entry in entries]
            install(self.module, CompactStore(trained))
        fill(self.module, self.state)
        masks = {name: self.masks[name] for name in self.specs if name in self.masks}
        return SparseModel(self.module, self.specs, masks, self.config)

    def _require_same(self) -> None:
        own = {name: _shape_of(name, spec.shape) for name, spec in discover(self.module).items()}
        found = {name: _shape_of(name, shape) for name, (_, shape) in self.found.items()}
        if found != own or set(self.specs) != set(own):
            differing = [name for name in {**own, **found} if own.get(name) != found.get(name)]
            first = differing[0] if differing else min(set(self.specs) ^ set(own))
            raise FormatError(
                f"{self.where!r} holds {self.config.architecture} and disagrees about {first!r} with the "
                f"{type(self.module).__name__} to be filled; give the model that it was made from, or an intact copy "
                f"if it is damaged."
            )
        # `fill` assigns tensors, so a wrong dtype would silently become the module's.
        for name, value, _ in held_state(self.module):
            dtype = self.found[name][0]
            if value.dtype != dtype and not is_extra_state(name):
                raise FormatError(f"{self.where!r} holds {name!r} as {dtype}, but the model has {value.dtype}.")


def _shape_of(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape that an entry must have; of an extra state, whose size may change as a network runs, none."""
    return () if is_extra_state(name) else shape


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a copy in torch's own memory.

    Matrix products may round in another way at addresses that are not aligned as torch aligns its tensors, and a
    training that resumes must take the same steps as one that never stopped.
    """
    return tensor.clone()
