"""The structure that a training found, to be trained again from new weights or from those that it started with.

What Mostafa & Wang (ICML 2019, section 5) and Frankle & Carbin (ICLR 2019) ask: is it the final structure that counts,
or the way there? A checksum of the starting weights is noted at every conversion, so that "the same" is checked.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import nn

from converters.budgets import Fitted
from converters.sources import named
from dsr_tool.errors import CheckFailed, FileError, FormatError, UsageError, unknown_name
from dsr_tool.sparse.discover import discover
from dsr_tool.sparse.folder import read_folder
from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparsity.budget import Budget
from dsr_tool.sparsity.config import ModelConfig

__all__ = ["CHECKSUM", "INITS", "checksum", "ticket"]

CHECKSUM = "starting_weights_sha256"
"""Where the record of a conversion has the checksum."""
INITS = ("fresh", "original")

_APART = 1_000_000
"""From the seed of the other model's weights to that of fresh ones, where none is given."""
_RULES = ("preset", "keep_dense", "sparsify", "granularity")  # what of a record says where zeros may be


@torch.no_grad()
def checksum(module: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of a state_dict, in its order."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def ticket(source: str | nn.Module, folder: str | Path, init: str = "fresh", seed: int | None = None) -> Fitted:
    """A model with exactly the masks of another, before it is trained.

    Args:
        source: the architecture of the other, by its name, or a module of it, which is changed in place.
        folder: the other: a model or run folder.
        init: `fresh` for random weights, or the module's own; `original` for those that the other had when it was
            converted, before anything was made zero.
        seed: of fresh weights; when absent, one that is far from that of the other's.

    Raises:
        UsageError: the architecture is not that of the folder, an option that does not fit, or fresh weights that are
            the original ones.
        FileError: there is no such folder, or the file of the original weights is gone.
        FormatError: the folder is damaged.
        CheckFailed: the original weights cannot be made again bit for bit.
    """
    if init not in INITS:
        raise unknown_name("--init", init, INITS)
    if init == "original" and seed is not None:
        raise UsageError("--seed goes with --init fresh; the original weights have the seed of their own conversion.")
    saved = read_folder(folder)
    if isinstance(source, str) and source != saved.config.architecture:
        raise UsageError(
            f"--structure {str(folder)!r} holds {saved.config.architecture}; give that as ARCH, not {source}."
        )
    record = saved.config.conversion
    start: dict[str, Any] = _recorded(record, folder) if init == "original" else _fresh(record, seed)
    module, config = _built(source, saved.config, start, folder)
    start[CHECKSUM] = checksum(module)
    if init == "original" and start[CHECKSUM] != record[CHECKSUM]:
        raise CheckFailed(
            f"the starting weights of {str(folder)!r} cannot be made again: {config.architecture} with weights "
            f"{start['weights']!r} and seed {start['seed']} comes out otherwise, since that file, the code or torch "
            f"has changed; give --init fresh."
        )
    if init == "fresh" and isinstance(source, str) and start[CHECKSUM] == record.get(CHECKSUM):
        raise UsageError(
            f"--init fresh with seed {start['seed']} gives exactly the weights that {str(folder)!r} started with; give "
            f"another --seed, or --init original."
        )
    _require_shapes(module, {name: spec.shape for name, spec in saved.specs.items()}, folder)
    masks = {name: torch.from_numpy(mask.to_bool()) for name, mask in saved.masks().items()}
    model = SparseModel(module, saved.specs, masks, config)
    model.apply_masks()
    active, prunable = model.active_weights, model.prunable_weights
    budget = Budget(sparsity=Fraction(prunable - active, prunable or 1))
    kept = {name: record[name] for name in _RULES if name in record}
    made = {"structure": str(folder), "init": init, **budget.to_record(), "active_weights": active}
    model.config = replace(config, conversion={**start, **kept, **made})
    return Fitted(model, budget)


def _fresh(record: dict[str, Any], seed: int | None) -> dict[str, Any]:
    """Weights and seed of fresh weights, of which the seed may be absent."""
    other = record.get("seed")
    apart = other + _APART if type(other) is int and 0 <= other < (1 << 63) - _APART else 0
    return {"weights": None, "seed": apart if seed is None else seed}


def _recorded(record: dict[str, Any], folder: str | Path) -> dict[str, Any]:
    """Weights and seed that a model was converted from, out of a file that may hold anything."""
    weights, seed = record.get("weights"), record.get("seed")
    if not isinstance(record.get(CHECKSUM), str):
        raise UsageError(
            f"{str(folder)!r} does not say what its weights were before its conversion, which older versions did not "
            f"note; give --init fresh."
        )
    if not isinstance(weights, str | None) or type(seed) is not int or not 0 <= seed < 1 << 63:
        raise FormatError(f"{str(folder)!r}: weights {weights!r} and seed {seed!r} are not understood; it is damaged.")
    return {"weights": weights, "seed": seed}


def _built(
    source: str | nn.Module, config: ModelConfig, start: dict[str, Any], folder: str | Path
) -> tuple[nn.Module, ModelConfig]:
    """The network of a description, with weights to start from, and its own description."""
    if not isinstance(source, str):
        return source, ModelConfig("module", type(source).__name__, 0, config.input_shape)
    try:
        return named(
            source,
            start["weights"],
            num_classes=None if config.source == "callable" else config.num_classes,
            input_shape=config.input_shape,
            width=config.width,
            seed=start["seed"],
        )
    except FileError as error:
        raise FileError(f"the starting weights of {str(folder)!r} cannot be made again: {error}") from error


def _require_shapes(module: nn.Module, shapes: dict[str, tuple[int, ...]], folder: str | Path) -> None:
    own = {name: spec.shape for name, spec in discover(module).items()}
    differing = next((name for name in {**own, **shapes} if own.get(name) != shapes.get(name)), None)
    if differing is not None:
        raise UsageError(
            f"--structure {str(folder)!r} disagrees about {differing!r} with the {type(module).__name__} to be filled; "
            f"give a network of the same architecture."
        )
