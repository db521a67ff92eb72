"""What published work kept dense, as rules for the layers of a module."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torchvision.models.regnet import ResBottleneckBlock
from torchvision.models.resnet import BasicBlock, Bottleneck

from converters.paper_models import WideBlock, WideResNet
from dsr_tool.errors import unknown_name
from dsr_tool.sparse.discover import Rules

__all__ = ["PRESETS", "rules_of"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def rules_of(module: nn.Module, *, preset: str | None, keep_dense: tuple[str, ...], sparsify: tuple[str, ...]) -> Rules:
    """Which layers of a module are sparse, as a user says it; see `converters.conversion.convert`.

    Raises:
        UsageError: nobody knows the preset.
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
    """Mostafa & Wang 2019, as in their code: the first convolution and those on shortcuts stay dense.

    Everything else that is a weight is sparse, the classifier included, but for that of wide residual networks.
    """
    names = {id(child): path for path, child in module.named_modules()}
    first = next((child for child in module.modules() if isinstance(child, _CONVOLUTIONS)), None)
    kept = {f"{names[id(first)]}.weight": "preset paper: first convolution"} if first is not None else {}
    for block in module.modules():
        shortcut = _shortcut(block)
        for child in shortcut.modules() if shortcut is not None else ():
            if isinstance(child, _CONVOLUTIONS):
                kept[f"{names[id(child)]}.weight"] = "preset paper: convolution on a shortcut"
        if isinstance(block, WideResNet):
            kept[f"{names[id(block.fc)]}.weight"] = "preset paper: classifier of a wide residual network"
    return kept


def _shortcut(block: nn.Module) -> nn.Module | None:
    """The projection beside a residual block, in the families that have one."""
    if isinstance(block, (BasicBlock, Bottleneck)):
        shortcut: nn.Module | None = block.downsample
        return shortcut
    if isinstance(block, WideBlock):
        return block.shortcut
    return block.proj if isinstance(block, ResBottleneckBlock) else None


PRESETS: dict[str, Callable[[nn.Module], dict[str, str]]] = {"paper": _paper}
