"""What published work kept dense, as rules for the layers of a module."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torchvision.models.regnet import ResBottleneckBlock
from torchvision.models.resnet import BasicBlock, Bottleneck

from dsr_tool.errors import unknown_name

__all__ = ["PRESETS", "preset"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def preset(name: str, module: nn.Module) -> dict[str, str]:
    """Weights that a preset keeps dense, with the reason.

    Raises:
        UsageError: nobody knows the preset.
    """
    if name not in PRESETS:
        raise unknown_name("--preset", name, PRESETS)
    return PRESETS[name](module)


def _paper(module: nn.Module) -> dict[str, str]:
    """Mostafa & Wang 2019, code for ResNet-50: the first convolution and those on shortcuts stay dense.

    Everything else that is a weight is sparse, the classifier included.
    """
    names = {id(child): path for path, child in module.named_modules()}
    first = next((child for child in module.modules() if isinstance(child, _CONVOLUTIONS)), None)
    kept = {f"{names[id(first)]}.weight": "preset paper: first convolution"} if first is not None else {}
    for block in module.modules():
        shortcut = _shortcut(block)
        for child in shortcut.modules() if shortcut is not None else ():
            if isinstance(child, _CONVOLUTIONS):
                kept[f"{names[id(child)]}.weight"] = "preset paper: convolution on a shortcut"
    return kept


def _shortcut(block: nn.Module) -> nn.Module | None:
    """The projection beside a residual block, in the families that have one."""
    if isinstance(block, (BasicBlock, Bottleneck)):
        shortcut: nn.Module | None = block.downsample
        return shortcut
    return block.proj if isinstance(block, ResBottleneckBlock) else None


PRESETS: dict[str, Callable[[nn.Module], dict[str, str]]] = {"paper": _paper}
