"""The model folder: `config.json`, `model.safetensors` with the plain state_dict, `masks.safetensors` with packed bits.

`docs/format.md` describes the three files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file as save_tensors
from torch import nn

from dsr_tool.errors import FileError, FormatError
from dsr_tool.files import new_folder, require_file, share
from dsr_tool.formats.tensor_file import TensorFile
from dsr_tool.sparsity.config import ModelConfig, installed_versions
from dsr_tool.sparsity.layers import LayerSpec
from dsr_tool.sparsity.mask import Mask

__all__ = [
    "CONFIG",
    "MASKS",
    "NEXT",
    "WEIGHTS",
    "ModelFolder",
    "current_file",
    "read_folder",
    "save_folder",
    "write_model",
]

CONFIG, WEIGHTS, MASKS = "config.json", "model.safetensors", "masks.safetensors"
"""Names of the three files."""

NEXT = ".next"
"""Sub-folder of files that are about to replace those beside it. A file in it counts as the current one."""

SCHEMA = "dsr-tool/model/1"


class Savable(Protocol):
    """The parts of a `SparseModel` that a folder holds; see its attributes.

    A protocol, because `SparseModel.save` calls this module.
    """

    module: nn.Module
    specs: dict[str, LayerSpec]
    masks: dict[str, torch.Tensor]
    config: ModelConfig

    def check(self) -> None:
        """Raises `CheckFailed` if weights and masks disagree."""


def current_file(folder: Path, name: str) -> Path:
    """Returns the path of a file that counts in a folder whose files may be in the middle of a replacement."""
    replacing = folder / NEXT / name
    return replacing if replacing.exists() else folder / name


class ModelFolder:
    """A model folder on disk. Weights and masks are read when they are asked for.

    Attributes:
        path: path of the folder.
        config: description of the model.
        specs: one `LayerSpec` per state_dict entry, by name.
        versions: names and versions of the packages that wrote it.
    """

    def __init__(self, path: Path) -> None:
        """Reads `config.json`; see `read_folder`."""
        self.path = path
        document = _read_json(self.file(CONFIG))
        # Before anything else is read, so that the message is about the version and not about a missing field.
        if document.get("schema") != SCHEMA:
            raise FormatError(
                f"{str(path / CONFIG)!r} has schema {document.get('schema')!r}; this dsr-tool reads {SCHEMA!r}."
            )
        try:
            self.config = ModelConfig.from_dict(document["model"])
            specs = [LayerSpec.from_dict(data) for data in document["layers"]]
            self.versions: dict[str, str] = dict(document["versions"])
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{str(path / CONFIG)!r} is invalid: {error}.") from error
        self.specs = {spec.name: spec for spec in specs}

    def file(self, name: str) -> Path:
        """Returns the path of one of the files, also while they are being replaced."""
        return current_file(self.path, name)

    def weights(self) -> dict[str, torch.Tensor]:
        """Reads the state_dict.

        Raises:
            FileError: the file is missing.
            FormatError: the file is damaged.
        """
        path = self.file(WEIGHTS)
        require_file(path, "weights")
        try:
            return load_tensors(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise FormatError(f"weights {str(path)!r} cannot be read ({error}); the file is damaged.") from error

    def masks(self) -> dict[str, Mask]:
        """Reads the masks of the sparse weights by name.

        Raises:
            FileError: the file is missing.
            FormatError: the file is damaged, or does not fit `specs`.
        """
        path = self.file(MASKS)
        require_file(path, "masks")
        try:
            file = TensorFile(path)
            bits = {name: file.get(name) for name in file.streams}
        except (FormatError, OSError) as error:
            raise FormatError(f"masks {str(path)!r} cannot be read ({error}); the file is damaged.") from error
        sparse = {name: spec for name, spec in self.specs.items() if spec.role == "sparse"}
        # Files of two different models, such as after a copy that was cut off.
        if set(bits) != set(sparse):
            name = min(set(bits) ^ set(sparse))
            raise FormatError(f"masks {str(path)!r} and {CONFIG} disagree about {name!r}; convert the model again.")
        try:
            return {name: Mask.from_bits(bits[name], spec.shape) for name, spec in sparse.items()}
        except FormatError as error:
            raise FormatError(f"masks {str(path)!r}: {error}") from error


def read_folder(path: str | Path) -> ModelFolder:
    """Opens a model folder.

    Raises:
        FileError: the folder does not exist, or has no `config.json`.
        FormatError: `config.json` is damaged or of another version.
    """
    path = Path(path)
    if not path.exists():
        raise FileError(f"model folder {str(path)!r} does not exist; make one with `dsr-tool convert`.")
    if not (path / CONFIG).is_file():
        raise FileError(f"{str(path)!r} is not a model folder: it has no {CONFIG}; make one with `dsr-tool convert`.")
    return ModelFolder(path)


def save_folder(model: Savable, path: str | Path, *, force: bool = False) -> None:
    """Writes a model folder under a temporary name and renames it when it is complete.

    Args:
        model: the model; it is checked first.
        path: the new folder.
        force: whether to replace an existing model folder.

    Raises:
        CheckFailed: weights and masks disagree.
        FileError: the folder exists and may not be replaced, or writing fails.
    """
    model.check()
    with new_folder(Path(path), marker=CONFIG, force=force) as part:
        write_model(model, part)


def write_model(model: Savable, folder: Path) -> None:
    """Writes the three files of a checked model into an existing folder."""
    document = {
        "schema": SCHEMA,
        "versions": installed_versions(),
        "model": model.config.to_dict(),
        "layers": [spec.to_dict() for spec in model.specs.values()],
    }
    (folder / CONFIG).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    save_tensors(_on_cpu(model.module.state_dict()), folder / WEIGHTS)
    bits = {name: Mask.from_bool(mask.cpu().contiguous().numpy()).bits for name, mask in model.masks.items()}
    save_arrays(bits, folder / MASKS)
    # safetensors creates files that only their owner can read.
    for name in (WEIGHTS, MASKS):
        share(folder / name)


def _on_cpu(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    # safetensors refuses tensors that are not contiguous, as weights in channels_last are.
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{str(path)!r} cannot be read as JSON ({error}); the file is damaged.") from error
    if not isinstance(document, dict):
        raise FormatError(f"{str(path)!r} does not hold a JSON object; the file is damaged.")
    return document
