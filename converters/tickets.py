"""Tickets: the structure of a trained model, to be trained again from new weights or from its original ones.

Mostafa & Wang (ICML 2019, section 5) and Frankle & Carbin (ICLR 2019) ask whether the final structure is enough, or
whether a training needs the way there. Every conversion records a checksum of the weights before it, so that "the
original weights" is checked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import torch
from torch import nn

from converters.budgets import Fitted
from converters.plain import make_plain
from converters.sources import find_source, load_network
from dsr_tool.errors import CheckFailed, FileError, FormatError, UsageError, unknown_name
from dsr_tool.sparse.discover import discover
from dsr_tool.sparse.folder import read_folder
from dsr_tool.sparse.in_file import values_of
from dsr_tool.sparse.model import SparseModel
from dsr_tool.sparsity.budget import Budget
from dsr_tool.sparsity.config import ModelConfig

__all__ = ["CHECKSUM", "INITS", "checksum", "make_ticket"]

CHECKSUM = "starting_weights_sha256"
"""Key of the checksum in the record of a conversion."""
INITS = ("fresh", "original")
"""Values of `--init`."""

_SEED_DISTANCE = 1_000_000
"""Distance from the seed of the other model's weights to that of fresh ones, if none is given."""
_RULES = ("preset", "keep_dense", "sparsify", "granularity")
"""Keys of a record that say which weights may be zero; a ticket copies them."""


@dataclass(frozen=True)
class _Start:
    """The weights that a ticket starts from.

    Attributes:
        weights: torchvision enum name or state_dict file; None for random weights.
        seed: seed of random weights.
    """

    weights: str | None
    seed: int


@torch.no_grad()
def checksum(module: nn.Module) -> str:
    """Returns the SHA-256 of names, dtypes, shapes and bytes of a state_dict, in its order."""
    # Names and shapes as well: equal bytes in another order are another network.
    digest = hashlib.sha256()
    for name, tensor in values_of(module).items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def make_ticket(source: str | nn.Module, folder: str | Path, init: str = "fresh", seed: int | None = None) -> Fitted:
    """Returns a model with exactly the masks of another one, before it is trained.

    Args:
        source: the architecture of the other model, by its name, or a module of it, which is changed in place.
        folder: model or run folder of the other model.
        init: `fresh` for random weights, or the module's own; `original` for the weights that the other model had
            before its conversion.
        seed: seed of fresh weights; when absent, one far from that of the other model.

    Raises:
        UsageError: the architecture is not that of the folder, an option does not fit, or fresh weights are equal to
            the original ones.
        FileError: the folder, or the file of the original weights, does not exist.
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
    start = _recorded_start(record, folder) if init == "original" else _fresh_start(record, seed)
    # Built before it is compared: that the recorded seed gives the recorded weights is exactly what is checked.
    module, config = _build(source, saved.config, start, folder)
    digest = checksum(module)
    if init == "original" and digest != record[CHECKSUM]:
        raise CheckFailed(
            f"the original weights of {str(folder)!r} cannot be made again: {config.architecture} with weights "
            f"{start.weights!r} and seed {start.seed} has other values now, since that file, the code or torch has "
            f"changed; give --init fresh."
        )
    # A module of the user's own may have whatever weights the user wants.
    if init == "fresh" and isinstance(source, str) and digest == record.get(CHECKSUM):
        raise UsageError(
            f"--init fresh with seed {start.seed} gives exactly the weights that {str(folder)!r} started with; give "
            f"another --seed, or --init original."
        )
    _require_shapes(module, {name: spec.shape for name, spec in saved.specs.items()}, folder)
    masks = {name: torch.from_numpy(mask.to_bool()) for name, mask in saved.masks().items()}
    model = SparseModel(module, saved.specs, masks, config)
    model.apply_masks()
    active, prunable = model.active_weights, model.prunable_weights
    budget = Budget(sparsity=Fraction(prunable - active, prunable or 1))
    model.config = replace(
        config,
        conversion={
            "weights": start.weights,
            "seed": start.seed,
            CHECKSUM: digest,
            **{name: record[name] for name in _RULES if name in record},
            "structure": str(folder),
            "init": init,
            **budget.to_record(),
            "active_weights": active,
        },
    )
    return Fitted(model, budget)


def _fresh_start(record: Mapping[str, object], seed: int | None) -> _Start:
    """Returns the start of random weights, with a seed far from the recorded one if none is given."""
    if seed is not None:
        return _Start(None, seed)
    # The record is from a file and may hold anything; a seed close to 2^63 would overflow, and True is an int too.
    recorded = record.get("seed")
    if isinstance(recorded, int) and not isinstance(recorded, bool) and 0 <= recorded < (1 << 63) - _SEED_DISTANCE:
        return _Start(None, recorded + _SEED_DISTANCE)
    return _Start(None, 0)


def _recorded_start(record: Mapping[str, object], folder: str | Path) -> _Start:
    """Returns the start that a model was converted from; its record is from a file and may hold anything."""
    weights, seed = record.get("weights"), record.get("seed")
    if not isinstance(record.get(CHECKSUM), str):
        raise UsageError(
            f"{str(folder)!r} does not record its weights before the conversion, as older versions did not; give "
            f"--init fresh."
        )
    is_seed = isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 1 << 63
    if not isinstance(weights, str | None) or not isinstance(seed, int) or not is_seed:
        raise FormatError(f"{str(folder)!r} records weights {weights!r} and seed {seed!r}; it is damaged.")
    return _Start(weights, seed)


def _build(
    source: str | nn.Module, config: ModelConfig, start: _Start, folder: str | Path
) -> tuple[nn.Module, ModelConfig]:
    """Returns the network of a description with the weights to start from, and its own description."""
    if not isinstance(source, str):
        module = make_plain(source).module
        return module, ModelConfig("module", type(module).__name__, 0, config.input_shape)
    try:
        module, described = load_network(
            source,
            start.weights,
            num_classes=config.num_classes if find_source(source).has_options else None,
            input_shape=config.input_shape,
            width=config.width,
            seed=start.seed,
        )
    except FileError as error:
        raise FileError(f"the original weights of {str(folder)!r} cannot be made again: {error}") from error
    # A ticket has the masks of the folder, also if its weights are from a file with pruning.
    return make_plain(module).module, described


def _require_shapes(module: nn.Module, shapes: dict[str, tuple[int, ...]], folder: str | Path) -> None:
    own = {name: spec.shape for name, spec in discover(module).items()}
    differing = next((name for name in {**own, **shapes} if own.get(name) != shapes.get(name)), None)
    if differing is not None:
        raise UsageError(
            f"--structure {str(folder)!r} disagrees about {differing!r} with the {type(module).__name__} to be filled; "
            f"give a network of the same architecture."
        )
