"""Compilation for a device, and the switches of torch that are set while a training runs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from dsr_tool.train.settings import TrainSettings

__all__ = ["compiled", "on_device"]


def compiled(module: nn.Module, settings: TrainSettings) -> nn.Module:
    """Returns the module, compiled with `torch.compile` if the settings ask for it.

    On a GPU it is replayed as CUDA graphs, since a small network computes faster than its kernels are launched. Graphs
    need tensors that stay where they are: masks, weights and optimizer state are only ever changed in place.
    """
    if not settings.compile:
        return module
    if settings.torch_device.type == "cuda":
        return torch.compile(module, mode="reduce-overhead", dynamic=False)  # type: ignore[return-value]
    return torch.compile(module, dynamic=False)  # type: ignore[return-value]


@contextmanager
def on_device(settings: TrainSettings) -> Iterator[None]:
    """Lets cuDNN choose convolutions by trial on a GPU, and frees compiled code at the end."""
    # Trials pay off because all batches of a training have one shape.
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or settings.torch_device.type == "cuda"
    try:
        with warnings.catch_warnings():
            # torch advises TF32 here; whoever chose fp32 has decided about that.
            warnings.filterwarnings("ignore", "TensorFloat32")
            yield
    finally:
        torch.backends.cudnn.benchmark = before
        if settings.compile:
            # Code and graphs of one model are useless to the next, and torch keeps only a limited number.
            torch.compiler.reset()
