"""Weights from files: the entries of a checkpoint that fit a network, loaded into it strictly."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from converters.checkpoints import Checkpoint, Found, dense
from converters.pickles import read_file, without_tensors
from converters.torch_prune import prune_module
from dsr_tool.errors import FormatError, UsageError, join_words
from dsr_tool.sparse.aliases import assign, completed, later_names
from dsr_tool.sparse.compact.marks import store_of
from dsr_tool.sparse.in_file import FileMaps

__all__ = ["fill", "fill_from_file", "fitting", "is_state_file", "load_file", "load_strictly", "read_weights"]

_SHOWN = 3
"""Largest number of names of a file that an error lists."""


def is_state_file(weights: str) -> bool:
    """Returns whether `--weights` means a file: by its ending, or because the file exists."""
    path, _ = _split(weights)
    return bool(weights) and (path.suffix in (".pth", ".pt", ".safetensors", ".bin", ".ckpt") or path.exists())


def read_weights(weights: str, module: nn.Module, optional: Sequence[str] = ()) -> Found:
    """Reads the entries of a file that fit a network best, under the network's names.

    Args:
        weights: path of the file, or `FILE#KEY` to choose one of several sets of weights in it.
        module: the network, which may be on the meta device; it does not change.
        optional: starts of names that may be missing, or there without need.

    Returns:
        The entries, which may be those of another network: `load_strictly` checks them.

    Raises:
        UsageError: the file has no weights of that key.
        FileError: the file does not exist.
        FormatError: the file is damaged, or holds something else.
    """
    path, choice = _split(weights)
    content = read_file(path)
    try:
        return fitting(content, module, optional, choice)
    except LookupError as error:
        raise FormatError(f"--weights file {str(path)!r} {without_tensors(content)}") from error


def fitting(content: object, module: nn.Module, optional: Sequence[str] = (), choice: str = "") -> Found:
    """Returns the entries of a checkpoint that fit a network best; see `read_weights`.

    Args:
        content: a state_dict, or mappings that hold one.
        module: the network.
        optional: starts of names that may be missing, or there without need.
        choice: keys or prefix of the entries that are meant; empty for the best.

    Raises:
        LookupError: there are no tensors.
        UsageError: there are no weights of that choice.
    """
    own = module.state_dict()
    shapes = {name: tuple(value.shape) for name, value in own.items()}
    found = Checkpoint.of(content, shapes).find(shapes, optional, choice)
    notes = [*found.notes, *_conversions(found.state, own)]
    if found.masks:
        notes.append(f"took the masks of {len(found.masks)} pruned weights")
    return replace(found, notes=tuple(notes))


def load_file(module: nn.Module, name: str, weights: str, *, in_file: bool = False) -> Found:
    """Fills a module with exactly the weights of a file; see `read_weights` and `load_strictly`.

    Returns:
        What was loaded, with notes on how it was found.
    """
    found = read_weights(weights, module)
    load_strictly(module, name, found.state, weights, found.label, in_file=in_file)
    return found


def fill_from_file(module: nn.Module, name: str, weights: str | None) -> dict[str, Any]:
    """Fills a module from a file, if one is given, and prunes it by torch's hooks if the file has masks.

    Weights may stay in the file; see `load_strictly`.

    Returns:
        What the description of the model records: `weights`, and `weights_read`, how they were found in the file.
    """
    if weights is None:
        return {"weights": None}
    found = load_file(module, name, weights, in_file=True)
    prune_module(module, found.masks)
    return {"weights": weights, **found.record}


def load_strictly(
    module: nn.Module,
    name: str,
    state: Mapping[str, torch.Tensor],
    origin: str,
    label: str = "",
    *,
    in_file: bool = False,
) -> None:
    """Fills a module, which may be on the meta device, with exactly its own entries.

    Args:
        module: the module, changed in place; its dtypes stay.
        name: name of the module, for messages.
        state: every entry of its state_dict.
        origin: where the state is from, for messages.
        label: keys and prefix under which the state was found there, for messages.
        in_file: whether parameters of two or more dimensions may stay in the file; see `sparse.in_file`.

    Raises:
        UsageError: names are missing or unknown, shapes differ, or integers are to become real numbers.
    """
    own = module.state_dict()
    # Files from before torch 0.4.1 lack the counters of batch normalisation.
    counters = {key: torch.zeros_like(value, device="cpu") for key, value in own.items() if value.ndim == 0}
    state = {**{key: value for key, value in counters.items() if key.endswith("num_batches_tracked")}, **state}
    later = later_names(module)
    state = completed(state, later)
    missing = sorted(set(own) - set(state))
    unknown = sorted(set(state) - set(own))
    differing = sorted(key for key in set(own) & set(state) if own[key].shape != state[key].shape)
    pruned = next((key for key in missing if {f"{key}_orig", f"{key}_mask"} <= set(unknown)), None)
    if pruned is not None:
        mask, values = tuple(state[f"{pruned}_mask"].shape), tuple(state[f"{pruned}_orig"].shape)
        raise UsageError(
            f"--weights {origin!r} holds a mask of shape {mask} for {pruned[:80]!r} of shape {values}; prune that "
            f"weight again, with a mask of its own shape."
        )
    if missing or unknown or differing:
        first = (missing or unknown or differing)[0][:80]  # the file decides how long a name is
        where = f", nearest under {label[:80]!r}" if label else ""
        there = [repr(key[:80]) for key in state if key in unknown][:_SHOWN]
        raise UsageError(
            f"--weights {origin!r} is no state_dict of {name}: {len(missing)} names missing, {len(unknown)} unknown, "
            f"{len(differing)} of another shape (first: {first!r}{where}){' with names such as ' * bool(there)}"
            f"{join_words(there, 'and')}; give the architecture that the file was made for."
        )
    for key, value in state.items():
        if own[key].is_floating_point() and not value.is_floating_point():
            raise UsageError(
                f"--weights {origin!r} holds {key!r} as {value.dtype}, but {name} has {own[key].dtype}; give weights "
                f"of real numbers that are not quantised."
            )
    _require_tied(state, later, name, origin)
    weights = {key for key, parameter in module.named_parameters() if in_file and parameter.ndim > 1}
    maps = FileMaps() if weights else None
    once = {key: value for key, value in state.items() if key not in later}
    fill(module, {key: _taken(value, own[key].dtype, maps if key in weights else None) for key, value in once.items()})


def _require_tied(state: Mapping[str, torch.Tensor], later: Mapping[str, str], name: str, origin: str) -> None:
    """Raises `UsageError` if a file has different values under two names that are one tensor of a network."""
    for key, earlier in later.items():
        one, other = state[earlier], state[key]
        # Bits are compared, so a NaN is equal to itself.
        if one is not other and not torch.equal(*(dense(each).reshape(-1).view(torch.uint8) for each in (one, other))):
            raise UsageError(
                f"--weights {origin!r} holds different values for {earlier[:80]!r} and {key[:80]!r}, which are one "
                f"tensor in {name}; give a network in which each has its own."
            )


def _taken(value: torch.Tensor, dtype: torch.dtype, maps: FileMaps | None) -> torch.Tensor:
    """Returns an entry in the type of the module: a copy, or a weight that stays in its file."""
    kept = maps.keep(value) if maps is not None and value.dtype == dtype else None
    return dense(value).to(dtype, copy=True) if kept is None else kept


def fill(module: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Assigns tensors with a module's own names and shapes to it; the module may be on the meta device.

    Of a tensor with several names, `state` may have any of them, and it stays one tensor. In compact storage, sparse
    weights are there already, and `state` has the others.
    """
    assign(module, state, strict=store_of(module) is None)


def _split(weights: str) -> tuple[Path, str]:
    """Returns path and key of `FILE#KEY`; the key is empty if there is none, or if a file has the whole as its name."""
    path, _, key = weights.rpartition("#")
    return (Path(path), key) if path and not Path(weights).exists() else (Path(weights), "")


def _conversions(state: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> list[str]:
    """Returns which types of values change when they are loaded, in words."""
    # Counters of batch normalisation are floats where they were averaged as well.
    pairs = Counter((value.dtype, own[key].dtype) for key, value in state.items() if key in own and value.ndim)
    return [
        f"converted {count} entries from {_short(one)} to {_short(other)}"
        for (one, other), count in pairs.items()
        if one != other
    ]


def _short(dtype: torch.dtype) -> str:
    return re.sub(r"^torch\.", "", str(dtype))
