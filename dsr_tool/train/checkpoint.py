"""The state of a training at the end of an epoch, in one safetensors file: nothing in it is unpickled.

Order of the data, augmentation and dropout follow from seed and epoch alone, so this and the model are all that a run
needs to go on as if it had never stopped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dsr_tool.errors import FormatError

__all__ = ["CHECKPOINT", "read_state", "write_state"]

CHECKPOINT = "training.safetensors"
"""Lies beside the model whose training it is, and is replaced together with it."""

_KEY, _REFERENCE = "dsr_training", "tensor:"


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a tree of mappings with text or integer keys, lists, plain values and tensors."""
    tensors: dict[str, torch.Tensor] = {}
    tree = _split(state, "", tensors)
    save_file(tensors, path, metadata={_KEY: json.dumps(tree)})


def read_state(path: Path) -> dict[str, Any]:
    """The tree that `write_state` wrote; keys that were integers come back as text.

    Raises:
        FormatError: the file is damaged, or of another kind.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tree = json.loads((file.metadata() or {})[_KEY])
            # A copy, since what is mapped into memory must not change with the file.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no mapping
        state = _join(tree, tensors)
        if not isinstance(state, dict):
            raise TypeError("no mapping")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise FormatError(f"checkpoint {str(path)!r} cannot be read ({error}); train again from the model.") from error
    return state


def _split(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        tensors[path] = value.detach().cpu().contiguous()
        return _REFERENCE + path
    if isinstance(value, Mapping):
        return {str(key): _split(entry, f"{path}/{key}", tensors) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_split(entry, f"{path}/{i}", tensors) for i, entry in enumerate(value)]
    return value


def _join(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, str) and value.startswith(_REFERENCE):
        return tensors[value.removeprefix(_REFERENCE)]
    if isinstance(value, dict):
        return {key: _join(entry, tensors) for key, entry in value.items()}
    if isinstance(value, list):
        return [_join(entry, tensors) for entry in value]
    return value
