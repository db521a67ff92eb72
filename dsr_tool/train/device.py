"""What a device wants: how the model is compiled for it, and the switches that are set while a training runs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from dsr_tool.train.settings import TrainSettings

__all__ = ["compiled", "on_device"]


def compiled(module: nn.Module, settings: TrainSettings) -> nn.Module:
    """The module, or what `torch.compile` makes of it where the settings say so.

    On a GPU it is replayed as CUDA graphs, since a small network's step is shorter than the launches of its kernels.
    Masks, weights and optimizer state are changed in place by everyone, which is what graphs need.
    """
    if not settings.compile:
        return module
    if settings.torch_device.type == "cuda":
        return torch.compile(module, mode="reduce-overhead", dynamic=False)  # type: ignore[return-value]
    return torch.compile(module, dynamic=False)  # type: ignore[return-value]


@contextmanager
def on_device(settings: TrainSettings) -> Iterator[None]:
    """Choose convolutions by trial on a GPU, whose shapes stay the same; let go of what was compiled at the end."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or settings.torch_device.type == "cuda"
    try:
        with warnings.catch_warnings():
            # Advice to give up precision, which is for whoever chose fp32 to decide.
            warnings.filterwarnings("ignore", "TensorFloat32")
            yield
    finally:
        torch.backends.cudnn.benchmark = before
        if settings.compile:
            # Code and graphs of one model are of no use to the next, and there is a limit to how many are kept.
            torch.compiler.reset()
