"""The checkpoint of a training: one safetensors file without any pickle, replaced together with the model.

Order of the data, augmentation and dropout follow from seed and epoch, so checkpoint and model are all that a run needs
to resume as if it had never stopped.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dsr_tool.errors import FormatError
from dsr_tool.sparse.folder import NEXT, write_model
from dsr_tool.sparse.model import SparseModel

__all__ = ["CHECKPOINT", "PART", "finish_replacing", "read_state", "replace_model", "sync", "write_state"]

CHECKPOINT = "training.safetensors"
"""Name of the file, in the folder of the model that it belongs to."""
PART = ".part."
"""Prefix of the folders that files are written to before they replace those of the run."""

_KEY, _REFERENCE = "dsr_training", "tensor:"
"""Metadata key of the JSON tree, and prefix of the texts in it that stand for tensors."""


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Writes a tree of mappings with text or integer keys, lists, plain values and tensors."""
    tensors: dict[str, torch.Tensor] = {}
    tree = _extract_tensors(state, "", tensors)
    save_file(tensors, path, metadata={_KEY: json.dumps(tree)})


def read_state(path: Path) -> dict[str, Any]:
    """Returns the tree that `write_state` wrote; integer keys come back as text.

    Raises:
        FormatError: the file is damaged or of another kind.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tree = json.loads((file.metadata() or {})[_KEY])
            # Copied, since tensors mapped into memory would change with the file, which the next epoch replaces.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no mapping
        state = _insert_tensors(tree, tensors)
        if not isinstance(state, dict):
            raise TypeError("its metadata is not a mapping")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise FormatError(
            f"checkpoint {str(path)!r} cannot be read ({error}); train again from the converted model."
        ) from error
    return state


def _extract_tensors(value: object, path: str, tensors: dict[str, torch.Tensor]) -> object:
    """Replaces each tensor of a tree by its name, and adds it to `tensors`."""
    if isinstance(value, torch.Tensor):
        # safetensors stores row-major tensors only; the reader restores the memory format.
        tensors[path] = value.detach().cpu().contiguous()
        return _REFERENCE + path
    if isinstance(value, Mapping):
        return {str(key): _extract_tensors(entry, f"{path}/{key}", tensors) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_extract_tensors(entry, f"{path}/{i}", tensors) for i, entry in enumerate(value)]
    return value


def _insert_tensors(value: object, tensors: Mapping[str, torch.Tensor]) -> object:
    """Replaces each name of a tensor in a tree by the tensor."""
    if isinstance(value, str) and value.startswith(_REFERENCE):
        return tensors[value.removeprefix(_REFERENCE)]
    if isinstance(value, dict):
        return {key: _insert_tensors(entry, tensors) for key, entry in value.items()}
    if isinstance(value, list):
        return [_insert_tensors(entry, tensors) for entry in value]
    return value


def replace_model(model: SparseModel, state: Mapping[str, Any], folder: Path) -> None:
    """Replaces model and checkpoint in `folder`: all files of them or none, whenever the process is killed.

    They are written to a folder of their own. Renaming that to `.next` commits them: from then on readers prefer the
    files in there to those next to it (`sparse.folder.current`).
    """
    part = Path(tempfile.mkdtemp(prefix=PART, dir=folder))
    try:
        write_model(model, part)
        write_state(part / CHECKPOINT, state)
        sync(part.iterdir())
        part.rename(folder / NEXT)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    try:
        finish_replacing(folder)
    except KeyboardInterrupt:  # only moves are left, so finish them before stopping
        finish_replacing(folder)
        raise


def finish_replacing(folder: Path) -> None:
    """Moves committed files into place, also those of a process that was killed while it moved them."""
    committed = folder / NEXT
    if committed.exists():
        for file in committed.iterdir():
            file.replace(folder / file.name)
        committed.rmdir()


def sync(files: Iterable[Path]) -> None:
    """Flushes files to the disk before others rely on them: a power cut must not leave a new name on old bytes."""
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
