"""state_dict files: reading pickles (as data) and safetensors, and loading them into a module strictly."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from dsr_tool.errors import FormatError, UsageError
from dsr_tool.files import require_file
from dsr_tool.formats.tensor_file import is_safetensors

__all__ = ["fill", "is_state_file", "load_strictly", "read_state"]

_START_BYTES = 16
"""Bytes of a file that are read to recognise safetensors."""


def is_state_file(weights: str) -> bool:
    """Returns whether `--weights` means a file: by its ending, or because the file exists."""
    return bool(weights) and (Path(weights).suffix in (".pth", ".pt", ".safetensors", ".bin") or Path(weights).exists())


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """Reads a state_dict, alone in its file or under the key `state_dict` of a checkpoint.

    Raises:
        FileError: the file does not exist.
        FormatError: the file is damaged, or holds something else.
    """
    require_file(path, "--weights file")
    try:
        state = _read(path)
    except Exception as error:  # a damaged pickle or zip may raise anything in its reader
        raise FormatError(
            f"--weights file {str(path)!r} cannot be read as a state_dict: it is damaged, or was written neither by "
            f"torch.save nor by safetensors."
        ) from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()
    ):
        raise FormatError(f"--weights file {str(path)!r} holds no state_dict of tensors.")
    # DataParallel prefixes every name with this.
    return {key.removeprefix("module."): value for key, value in state.items()}


def load_strictly(module: nn.Module, name: str, state: Mapping[str, torch.Tensor], origin: str) -> None:
    """Fills a module, which may be on the meta device, with exactly its own entries.

    Args:
        module: the module, changed in place; its dtypes stay.
        name: name of the module, for messages.
        state: every entry of its state_dict.
        origin: where the state is from, for messages.

    Raises:
        UsageError: names are missing or unknown, or shapes differ.
    """
    own = module.state_dict()
    # Files from before torch 0.4.1 lack the counters of batch normalisation.
    counters = {key: torch.zeros_like(value, device="cpu") for key, value in own.items() if value.ndim == 0}
    state = {**{key: value for key, value in counters.items() if key.endswith("num_batches_tracked")}, **state}
    missing = sorted(set(own) - set(state))
    unknown = sorted(set(state) - set(own))
    differing = sorted(key for key in set(own) & set(state) if own[key].shape != state[key].shape)
    if missing or unknown or differing:
        first = (missing or unknown or differing)[0][:80]  # the file decides how long a name is
        raise UsageError(
            f"--weights {origin!r} is no state_dict of {name}: {len(missing)} names missing, {len(unknown)} unknown, "
            f"{len(differing)} of another shape (first: {first!r}); give the architecture that the file was made for."
        )
    fill(module, {key: value.to(own[key].dtype, copy=True) for key, value in state.items()})


def fill(module: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Assigns tensors with a module's own names and shapes to it; the module may be on the meta device."""
    # torch keeps the versions of the layers beside the tensors, and some models (MNASNet) read theirs when they load.
    versioned = OrderedDict(state)
    versioned._metadata = module.state_dict()._metadata  # type: ignore[attr-defined]
    module.load_state_dict(versioned, assign=True)


def _read(path: Path) -> object:
    """Returns the content of a file; pickles are read as data and cannot run code."""
    # By content: files of either kind are called `.bin`. torch.load gets the open file, since it goes by names as well.
    with path.open("rb") as file, warnings.catch_warnings():
        if is_safetensors(file.read(_START_BYTES)):
            return load_file(path)
        file.seek(0)
        warnings.simplefilter("ignore")  # about unusual pickles, which `read_state` refuses if they are no state_dict
        return torch.load(file, map_location="cpu", weights_only=True)
