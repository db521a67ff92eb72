"""Source: torchvision's classification models, by name."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torchvision import models

from dsr_tool.core.config import MOST_CLASSES, ModelConfig, Preprocessing
from dsr_tool.core.files import require_file
from dsr_tool.errors import FileError, FormatError, UsageError, unknown_name

_OWN_NORMALISATION = ("googlenet", "inception_v3")
"""With its own weights torchvision builds these to undo ImageNet's normalisation inside; ours take 0.5 outside."""

__all__ = ["architectures", "build", "load", "structure"]


def architectures() -> list[str]:
    """Names of all classification models of the installed torchvision."""
    names: list[str] = models.list_models(module=models)
    return names


def build(name: str, num_classes: int = 1000) -> nn.Module:
    """A randomly initialised model.

    Raises:
        UsageError: torchvision has no classification model of that name.
    """
    if name not in architectures():
        raise unknown_name("ARCH", name, architectures())
    # These two warn unless they are told to use their own initialisation.
    options = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    module: nn.Module = models.get_model(name, weights=None, num_classes=num_classes, **options)
    return module


def structure(name: str, num_classes: int = 1000) -> nn.Module:
    """A model without values, on the meta device, to be filled with `load_state_dict(..., assign=True)`.

    Where the builder computes with tensors, which the meta device cannot (RegNet), it is a real one.
    """
    try:
        with torch.device("meta"):
            return build(name, num_classes)
    except NotImplementedError:
        return build(name, num_classes)


def load(
    name: str,
    weights: str | None = None,
    *,
    num_classes: int | None = None,
    input_size: int | None = None,
    seed: int = 0,
) -> tuple[nn.Module, ModelConfig]:
    """Build a model, fill in its weights, and describe it.

    Args:
        name: torchvision's name (`resnet50`).
        weights: enum name (`ResNet50_Weights.IMAGENET1K_V2`, `IMAGENET1K_V2`, `DEFAULT`), a state_dict file, or None
            for random weights.
        num_classes: a new head of so many classes where it differs from what the weights have.
        input_size: side of the square input in pixels; the architecture's own when absent.
        seed: of random weights.

    Raises:
        UsageError: unknown name or weights, weights of another architecture, or a head the model cannot have.
        FormatError: the state_dict file cannot be read.
    """
    if name not in architectures():
        raise unknown_name("ARCH", name, architectures())
    if num_classes is not None and not 1 <= num_classes <= MOST_CLASSES:
        raise UsageError(f"--num-classes {num_classes} is not allowed; give 1 to {MOST_CLASSES:,}.")
    if input_size is not None and input_size < 1:
        raise UsageError(f"--input-size {input_size} is not allowed; give pixels, 1 or more.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if weights is None:
            module, enum = build(name, num_classes or 1000), None
        elif _is_file(weights):
            module, enum = _from_file(name, Path(weights), num_classes), None
        else:
            module, enum = _from_enum(name, weights, num_classes)
    own_head = num_classes is None or num_classes == len(_categories(enum))
    size = input_size or _input_size(name, module, enum)
    config = ModelConfig(
        source="torchvision",
        architecture=name,
        num_classes=num_classes or _head(module)[1],
        input_shape=(3, size, size),
        preprocessing=_preprocessing(name, enum, size, trained=weights is not None),
        labels=tuple(_categories(enum)) if own_head else (),
        conversion={"weights": weights if enum is None else str(enum)},
    )
    return module, config


def _is_file(weights: str) -> bool:
    return bool(weights) and (Path(weights).suffix in (".pth", ".pt", ".safetensors", ".bin") or Path(weights).exists())


def _from_enum(name: str, weights: str, num_classes: int | None) -> tuple[nn.Module, Any]:
    enum_class = models.get_model_weights(name)
    short = weights.removeprefix(f"{enum_class.__name__}.")
    known = ["DEFAULT", *enum_class.__members__]
    if short not in known:
        prefix = f"{enum_class.__name__}." if "." in weights else ""
        raise unknown_name("--weights", weights, [prefix + key for key in known])
    enum = enum_class[short]
    try:
        # torch.hub announces the download there.
        with contextlib.redirect_stderr(io.StringIO()):
            state = enum.get_state_dict(progress=False, check_hash=True)
    except OSError as error:
        raise FileError(
            f"--weights {weights!r} could not be downloaded ({error}); give the path of a state_dict file instead."
        ) from error
    return _with_state(name, state, num_classes, str(enum)), enum


def _from_file(name: str, path: Path, num_classes: int | None) -> nn.Module:
    require_file(path, "--weights file")
    try:
        state = _read_state(path)
    except Exception as error:  # a damaged pickle or zip ends in whatever the reader trips over
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
    return _with_state(name, state, num_classes, str(path))


def _read_state(path: Path) -> Any:
    """What a file holds; pickles are read as data, never run."""
    if path.suffix == ".safetensors":
        return load_file(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about unusual pickles, which fail below if they are no state_dict
        return torch.load(path, map_location="cpu", weights_only=True)


def _with_state(name: str, state: Mapping[str, torch.Tensor], num_classes: int | None, what: str) -> nn.Module:
    """A model with the state loaded strictly; its head is replaced when another number of classes is asked for."""
    # DataParallel writes every name behind this prefix.
    state = {key.removeprefix("module."): value for key, value in state.items()}
    module = structure(name)
    path, outputs = _head(module)
    head = state.get(f"{path}.weight")
    if head is not None and head.ndim >= 2 and head.shape[0] != outputs:
        outputs = head.shape[0]
        module = structure(name, outputs)
    if num_classes in (None, outputs):
        _load_strictly(module, name, state, what)
        return module
    _load_strictly(module, name, state, what)
    target = build(name, num_classes or outputs)
    fitting = {key: value.shape for key, value in target.state_dict().items()}
    kept = {key: value for key, value in module.state_dict().items() if fitting.get(key) == value.shape}
    target.load_state_dict(kept, strict=False)
    return target


def _load_strictly(module: nn.Module, name: str, state: Mapping[str, torch.Tensor], what: str) -> None:
    own = module.state_dict()
    # Files from before torch 0.4.1 lack the counters of batch normalisation.
    counters = {key: torch.zeros_like(value, device="cpu") for key, value in own.items() if value.ndim == 0}
    state = {**{key: value for key, value in counters.items() if key.endswith("num_batches_tracked")}, **state}
    missing = sorted(set(own) - set(state))
    unknown = sorted(set(state) - set(own))
    differing = sorted(key for key in set(own) & set(state) if own[key].shape != state[key].shape)
    if missing or unknown or differing:
        first = (missing or unknown or differing)[0]
        raise UsageError(
            f"--weights {what!r} is no state_dict of {name}: {len(missing)} names missing, {len(unknown)} unknown, "
            f"{len(differing)} of another shape (first: {first!r}); give the architecture that the file was made for."
        )
    module.load_state_dict({key: value.to(own[key].dtype, copy=True) for key, value in state.items()}, assign=True)


def _head(module: nn.Module) -> tuple[str, int]:
    """Path and outputs of the last linear or convolutional layer: the classifier in every torchvision model."""
    layers = {path: child for path, child in module.named_modules() if isinstance(child, (nn.Linear, nn.Conv2d))}
    path, layer = list(layers.items())[-1]
    return path, int(layer.weight.shape[0])


def _input_size(name: str, module: nn.Module, enum: Any) -> int:
    """Pixels that the weights, the module or the architecture's default weights were made for."""
    if enum is None and isinstance(getattr(module, "image_size", None), int):
        return int(module.image_size)  # type: ignore[arg-type]
    crop = (enum or models.get_model_weights(name).DEFAULT).transforms().crop_size
    return int(crop[0])


def _preprocessing(name: str, enum: Any, size: int, *, trained: bool) -> Preprocessing:
    """What the weights were trained with; otherwise ImageNet's usual 256 / 224 in proportion to the size."""
    usual = Preprocessing(resize=round(size * 256 / 224), crop=size)
    if enum is not None:
        transforms = enum.transforms()
        usual = Preprocessing(
            round(int(transforms.resize_size[0]) * size / int(transforms.crop_size[0])),
            size,
            tuple(transforms.mean),
            tuple(transforms.std),
            str(transforms.interpolation.value),
        )
    if trained and name in _OWN_NORMALISATION:
        usual = replace(usual, mean=(0.5,) * 3, std=(0.5,) * 3)
    return usual


def _categories(enum: Any) -> list[str]:
    return [] if enum is None else list(enum.meta["categories"])
