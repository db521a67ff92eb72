"""Weights of torchvision's models: published ones or those of a file, with the head that they have or a new one."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision import models
from torchvision.models import WeightsEnum

from converters import torchvision_detectors as detectors
from converters.checkpoints import Found
from converters.state_dicts import fitting, load_strictly, read_weights
from converters.torch_prune import prune_module
from converters.torchvision_builders import build, structure
from converters.torchvision_similar import similar_architecture
from dsr_tool.errors import FileError, UsageError, unknown_name
from dsr_tool.files import disk_is_full
from dsr_tool.sparse.detectors import detector_kind

__all__ = ["AUXILIARY", "FRESH", "class_head", "from_enum", "from_file"]

FRESH = "fresh"
"""Key, in the record of a conversion, of the names of parameters that were never trained."""
AUXILIARY = ("aux_classifier.", "aux1.", "aux2.", "AuxLogits.")
"""Prefixes of auxiliary heads, which files may have or lack; the output in eval mode does not depend on them."""


def from_file(name: str, weights: str, num_classes: int | None) -> tuple[nn.Module, dict[str, Any]]:
    """Returns a model with the weights of a file, a new head if another number of classes is wanted, and the record.

    Raises:
        UsageError: the file holds weights of another architecture.
        FileError: it does not exist.
        FormatError: it cannot be read.
    """
    return _with_state(name, read_weights(weights, structure(name), AUXILIARY), num_classes, weights)


def from_enum(name: str, weights: str, num_classes: int | None) -> tuple[nn.Module, dict[str, Any], WeightsEnum]:
    """Returns a model with published weights, downloaded if they are not in torch's cache; else as `_with_state`."""
    enum_class = models.get_model_weights(name)
    short = weights.removeprefix(f"{enum_class.__name__}.")
    known = list({"DEFAULT": None, **enum_class.__members__})
    if short not in known:
        prefix = f"{enum_class.__name__}." if "." in weights else ""
        raise unknown_name("--weights", weights, [prefix + key for key in known])
    enum: WeightsEnum = enum_class[short]
    try:
        # torch.hub announces the download on stderr even without a progress bar.
        with contextlib.redirect_stderr(io.StringIO()):
            state = enum.get_state_dict(progress=False, check_hash=True)
    except OSError as error:
        cache = Path(torch.hub.get_dir())
        if disk_is_full(error, cache):
            raise FileError(
                f"--weights {weights!r} could not be stored: the folder {str(cache)!r} is full; free some space there, "
                f"or set TORCH_HOME to a folder on a disk with more."
            ) from error
        raise FileError(
            f"--weights {weights!r} could not be downloaded ({error}); give the path of a state_dict file instead."
        ) from error
    return *_with_state(name, fitting(state, structure(name), AUXILIARY), num_classes, str(enum)), enum


def _with_state(name: str, found: Found, num_classes: int | None, what: str) -> tuple[nn.Module, dict[str, Any]]:
    """Returns a model with a state loaded strictly, and a new head if another number of classes is wanted.

    Returns:
        The model, pruned by torch's hooks if the file has masks; and what the description of the model records:
        `weights_read`, how the weights were found in the file, and `fresh`, the names of random parameters.
    """
    found = detectors.with_new_names(found, structure(name))
    module, fresh = _loaded(name, found, num_classes, what)
    if num_classes is not None and num_classes != class_head(module)[1]:
        module, new = _with_new_head(name, module, num_classes)
        fresh += new
    prune_module(module, found.masks)
    names = sorted({key for key, _ in module.named_parameters()}.intersection(fresh))
    return module, {
        **found.record,
        **({FRESH: names} if names else {}),
    }


def _loaded(name: str, found: Found, num_classes: int | None, what: str) -> tuple[nn.Module, list[str]]:
    """Returns a model with the head that its weights have, and the names of the entries that they lack.

    Raises:
        UsageError: the weights are those of another architecture, or their head is missing and no new one is wanted.
    """
    # Without values: random ones would be replaced at once.
    module = structure(name)
    path, outputs, each = class_head(module)
    # The file may hold a model with another number of classes than torchvision's default.
    head = found.state.get(f"{path}.weight")
    if head is not None and head.ndim >= 2 and head.shape[0] not in (0, outputs * each):
        outputs = max(1, head.shape[0] // each)
        module = structure(name, outputs)
    fresh = [key for key in module.state_dict() if key not in found.state and key.startswith(AUXILIARY)]
    fresh += _missing_head(found, path, num_classes, what, name)
    random = build(name, outputs).state_dict() if fresh else {}
    try:
        load_strictly(
            module, name, {**found.state, **{key: random[key] for key in fresh}}, what, found.label, in_file=True
        )
    except UsageError as error:
        if (other := similar_architecture(name, found.state, AUXILIARY)) is None:
            raise
        raise UsageError(
            f"--weights {what!r} is no state_dict of {name}, but of {other}; give that as ARCH."
        ) from error
    return module, fresh


def _with_new_head(name: str, module: nn.Module, num_classes: int) -> tuple[nn.Module, list[str]]:
    """Returns a model with another number of classes, and the names of its entries that have random values.

    Everything that has the same shape in both is copied.
    """
    target = build(name, num_classes)
    shapes = {key: value.shape for key, value in target.state_dict().items()}
    kept = {key: value for key, value in module.state_dict(keep_vars=True).items() if shapes.get(key) == value.shape}
    target.load_state_dict(kept, strict=False, assign=True)
    return target, [key for key in shapes if key not in kept]


def _missing_head(found: Found, path: str, num_classes: int | None, what: str, name: str) -> list[str]:
    """Returns the names of a head that a file lacks, if nothing else is missing and a new head is wanted anyway.

    Raises:
        UsageError: the head is missing, and no number of classes is given.
    """
    child = path.partition(".")[0]
    if not found.missing or not all(key.startswith(f"{child}.") for key in found.missing):
        return []
    if num_classes is None:
        raise UsageError(
            f"--weights {what!r} holds {name} without its head {child!r}, as files for transfer do; give --num-classes "
            f"for a new one."
        )
    return list(found.missing)


def class_head(module: nn.Module) -> tuple[str, int, int]:
    """Returns the path of the layer that predicts classes, their number, and the layer's outputs for each.

    In every model but a detector, it is the last linear or convolutional layer.
    """
    if detector_kind(module) is not None:
        return detectors.class_head(module)
    layers = {
        path: child for path, child in module.named_modules() if isinstance(child, (nn.Linear, nn.Conv2d, nn.Conv3d))
    }
    path, layer = list(layers.items())[-1]
    return path, int(layer.weight.shape[0]), 1
