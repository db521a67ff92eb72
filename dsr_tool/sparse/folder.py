"""The model folder: config.json, model.safetensors with plain state_dict keys, masks.safetensors with packed bits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file as save_tensors

from dsr_tool.errors import FileError, FormatError
from dsr_tool.files import new_folder, require_file, share
from dsr_tool.formats.tensor_file import TensorFile
from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparsity.config import ModelConfig, installed_versions
from dsr_tool.sparsity.layers import LayerSpec
from dsr_tool.sparsity.mask import Mask

__all__ = ["CONFIG", "MASKS", "NEXT", "WEIGHTS", "Saved", "current", "read_folder", "save_folder", "write_model"]

CONFIG, WEIGHTS, MASKS = "config.json", "model.safetensors", "masks.safetensors"
NEXT = ".next"
"""Folder of files that are about to replace those beside it; they count from the moment it has this name."""

SCHEMA = "dsr-tool/model/1"


def current(folder: Path, name: str) -> Path:
    """Path of a file in a folder whose files may just be replaced."""
    replacing = folder / NEXT / name
    return replacing if replacing.exists() else folder / name


class Saved:
    """A model folder as read, before it meets a module.

    Attributes:
        path: the folder.
        config: what the model is.
        specs: one per state_dict entry.
        versions: what wrote it.
    """

    def __init__(self, path: Path) -> None:
        """Read `config.json`; see `read_folder` for what is raised."""
        self.path = path
        document = _read_json(self.file(CONFIG))
        if document.get("schema") != SCHEMA:
            raise FormatError(
                f"{str(path / CONFIG)!r} has schema {document.get('schema')!r}; this dsr-tool reads {SCHEMA!r}."
            )
        try:
            self.config = ModelConfig.from_dict(document["model"])
            specs = [LayerSpec.from_dict(data) for data in document["layers"]]
            self.versions: dict[str, str] = dict(document["versions"])
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{str(path / CONFIG)!r} is not understood: {error}.") from error
        self.specs = {spec.name: spec for spec in specs}

    def file(self, name: str) -> Path:
        """Path of one of the files, also while they are being replaced."""
        return current(self.path, name)

    def weights(self) -> dict[str, torch.Tensor]:
        """The state_dict."""
        path = self.file(WEIGHTS)
        require_file(path, "weights")
        try:
            return load_tensors(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise FormatError(f"weights {str(path)!r} cannot be read ({error}); the file is damaged.") from error

    def masks(self) -> dict[str, Mask]:
        """Masks of the sparse layers, checked against the shapes of the specs."""
        path = self.file(MASKS)
        require_file(path, "masks")
        try:
            file = TensorFile(path)
            bits = {name: file.get(name) for name in file.streams}
        except (FormatError, OSError) as error:
            raise FormatError(f"masks {str(path)!r} cannot be read ({error}); the file is damaged.") from error
        sparse = {name: spec for name, spec in self.specs.items() if spec.role == "sparse"}
        if set(bits) != set(sparse):
            name = min(set(bits) ^ set(sparse))
            raise FormatError(f"masks {str(path)!r} and {CONFIG} disagree about {name!r}; convert the model again.")
        try:
            return {name: Mask.from_bits(bits[name], spec.shape) for name, spec in sparse.items()}
        except FormatError as error:
            raise FormatError(f"masks {str(path)!r}: {error}") from error


def read_folder(path: str | Path) -> Saved:
    """Open a model folder.

    Raises:
        FileError: there is no such folder, or it lacks a file.
        FormatError: a file in it is damaged or of another version.
    """
    path = Path(path)
    if not path.exists():
        raise FileError(f"model folder {str(path)!r} does not exist; make one with `dsr-tool convert`.")
    if not (path / CONFIG).is_file():
        raise FileError(f"{str(path)!r} is not a model folder: it has no {CONFIG}; make one with `dsr-tool convert`.")
    return Saved(path)


def save_folder(model: SparseModel, path: str | Path, *, force: bool = False) -> None:
    """Write a model folder beside its place and move it there when it is whole.

    Raises:
        CheckFailed: weights and masks disagree.
        FileError: the folder exists without `force`, or the disk refuses it.
    """
    model.check()
    with new_folder(Path(path), marker=CONFIG, force=force) as part:
        write_model(model, part)


def write_model(model: SparseModel, folder: Path) -> None:
    """Write the three files of a checked model into an existing folder."""
    document = {
        "schema": SCHEMA,
        "versions": installed_versions(),
        "model": model.config.to_dict(),
        "layers": [spec.to_dict() for spec in model.specs.values()],
    }
    (folder / CONFIG).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    save_tensors(_plain(model.module.state_dict()), folder / WEIGHTS)
    tensors = {name: Mask.from_bool(mask.cpu().contiguous().numpy()).bits for name, mask in model.masks.items()}
    save_arrays(tensors, folder / MASKS)
    for name in (WEIGHTS, MASKS):
        share(folder / name)


def _plain(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{str(path)!r} cannot be read as JSON ({error}); the file is damaged.") from error
    if not isinstance(document, dict):
        raise FormatError(f"{str(path)!r} does not hold a JSON object; the file is damaged.")
    return document
