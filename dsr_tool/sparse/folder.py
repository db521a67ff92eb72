"""The model folder: `config.json`, `model.safetensors` with the plain state_dict, `masks.safetensors` with packed bits.

`docs/format.md` describes the three files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file as load_tensors
from torch import nn

from dsr_tool.errors import FileError, FormatError
from dsr_tool.files import new_folder, require_file, share
from dsr_tool.formats.tensor_file import TensorFile
from dsr_tool.formats.tensor_writer import Planned, write_arrays
from dsr_tool.sparse.compact.change import held_state
from dsr_tool.sparse.contract import DTYPES
from dsr_tool.sparsity.config import ModelConfig, installed_versions
from dsr_tool.sparsity.layers import LayerSpec
from dsr_tool.sparsity.mask import Mask
from dsr_tool.sparsity.tensor import Array

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
    config: ModelConfig

    def mask_of(self, name: str, shape: tuple[int, ...]) -> Mask:
        """Returns the mask of an entry."""

    def check_writable(self) -> None:
        """Raises `CheckFailed` if weights and masks disagree, or `UsageError` if no file can hold the state."""


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

    def entries(self) -> Iterator[tuple[str, torch.Tensor, Mask | None]]:
        """Yields name, tensor and mask of each entry of the state_dict, read one at a time; no mask for dense entries.

        Raises:
            FileError: a file is missing.
            FormatError: a file is damaged, or the files are of two models.
        """
        masks = self.masks()
        for name, tensor in self._tensors():
            yield name, tensor, masks.pop(name, None)
        if masks:
            raise FormatError(f"{str(self.path)!r} has a mask and no weight {min(masks)!r}; convert the model again.")

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        path = self.file(WEIGHTS)
        require_file(path, "weights")
        try:
            # Plain reads: a mapped file would count as memory of this process for as long as a tensor of it lives.
            file = TensorFile(path)
        except (FormatError, OSError):
            # Types that numpy lacks; and the message about a file that is damaged.
            yield from self.weights().items()
            return
        for name in file.streams:
            try:
                array = file.get(name)
            except (FormatError, OSError) as error:
                raise FormatError(f"weights {str(path)!r} cannot be read ({error}); the file is damaged.") from error
            yield name, torch.from_numpy(array)


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
    model.check_writable()
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
    # One tensor at a time: of a compact model, no more than one dense weight exists.
    write_arrays(folder / WEIGHTS, [_planned(name, held, make) for name, held, make in held_state(model.module)])
    masks = [(spec.name, spec.shape) for spec in model.specs.values() if spec.role == "sparse"]
    write_arrays(folder / MASKS, [_planned_mask(model, name, shape) for name, shape in masks])
    # safetensors' own writer makes files that only their owner can read; these are for everybody, as the JSON is.
    for name in (WEIGHTS, MASKS):
        share(folder / name)


def _planned(name: str, like: torch.Tensor, make: Callable[[], torch.Tensor]) -> Planned:
    """Returns how a tensor will be written; `like` has its type and shape."""

    def array() -> Array:
        # Plain bytes, since numpy has no bfloat16; row-major, since weights may be in channels_last.
        raw: Array = make().detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return raw

    return Planned(name, DTYPES[like.dtype], tuple(like.shape), array)


def _planned_mask(model: Savable, name: str, shape: tuple[int, ...]) -> Planned:
    return Planned(name, "U8", (-(-math.prod(shape) // 8),), lambda: model.mask_of(name, shape).bits)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{str(path)!r} cannot be read as JSON ({error}); the file is damaged.") from error
    if not isinstance(document, dict):
        raise FormatError(f"{str(path)!r} does not hold a JSON object; the file is damaged.")
    return document
