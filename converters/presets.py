"""Presets: what published work kept dense, as rules for the layers of a module."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from converters.sources import SOURCES
from dsr_tool.errors import unknown_name
from dsr_tool.sparse.discover import Rules

__all__ = ["PRESETS", "make_rules"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def make_rules(
    module: nn.Module, *, preset: str | None, keep_dense: tuple[str, ...], sparsify: tuple[str, ...]
) -> Rules:
    """Returns the rules for which layers of a module become sparse; for the arguments see `convert`.

    Raises:
        UsageError: the preset is unknown.
    """
    if preset is not None and preset not in PRESETS:
        raise unknown_name("--preset", preset, PRESETS)
    return Rules(
        keep_dense=keep_dense,
        sparsify=sparsify,
        preset_dense=PRESETS[preset](module) if preset is not None else {},
        small_layers=preset is None,
    )


def _paper(module: nn.Module) -> dict[str, str]:
    """Returns the weights that the code of Mostafa & Wang (2019) kept dense, each with the reason.

    These are the first convolution, convolutions on shortcuts, and the classifier of wide residual networks. All other
    weights are sparse there, other classifiers included.
    """
    names = {id(child): path for path, child in module.named_modules()}
    first = next((child for child in module.modules() if isinstance(child, _CONVOLUTIONS)), None)
    dense = {f"{names[id(first)]}.weight": "preset paper: first convolution"} if first is not None else {}
    # Every block is shown to every source, since a network of the user's own may be made of torchvision's blocks.
    for block in module.modules():
        for layer, reason in (found for source in SOURCES.values() for found in source.preset_dense(block)):
            # A shortcut may be a convolution with its normalisation.
            for child in layer.modules():
                if isinstance(child, (*_CONVOLUTIONS, nn.Linear)):
                    dense[f"{names[id(child)]}.weight"] = f"preset paper: {reason}"
    return dense


PRESETS: dict[str, Callable[[nn.Module], dict[str, str]]] = {"paper": _paper}
"""Presets by name: from a module to its weights that stay dense, each with the reason."""
