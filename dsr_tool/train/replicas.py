"""A module as torch's DistributedDataParallel, whose backward pass averages gradients over all processes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from dsr_tool.sparse.model import SparseModel
from dsr_tool.train.ranks import Ranks

__all__ = ["common_tensors", "replicate", "without_sync"]

# torch 2.14 renamed the argument, and warns of the old name.
_SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel.__init__).parameters
)


def replicate(forward: nn.Module, module: nn.Module, example: torch.Tensor) -> nn.Module:
    """Returns a module whose backward pass also averages gradients over the ranks; alone, the module itself.

    All ranks get the weights of rank 0. Messages are sent while the backward pass goes on, except where `forward` is
    compiled: then it is one operation, and they follow it.

    Args:
        forward: the module, or the same one compiled.
        module: the module itself, on its device.
        example: a batch of inputs, of which only shape, device and memory format count.
    """
    if Ranks.current().count == 1 or not any(parameter.requires_grad for parameter in module.parameters()):
        return forward
    try:
        unused = _without_gradient(module, example)
    except RuntimeError:
        unused = None  # the first step fails in the same way, and explains it
    options: dict[str, Any] = {
        # Running statistics are not read while training, so one message per epoch gives the same result.
        _SYNC_BUFFERS: False,
        # Gradients lie in the messages instead of beside them. Masking changes them in place, which keeps that.
        "gradient_as_bucket_view": True,
        # The others would wait for a gradient that never comes. torch advises against it where it is not needed.
        "find_unused_parameters": bool(unused),
    }
    devices = [torch.cuda.current_device()] if example.device.type == "cuda" else None
    replica = DistributedDataParallel(forward, device_ids=devices, **options)
    if forward is module and unused is not None:  # compiled code is for one batch size
        _arrange_messages(replica, module, example)
    return replica


def common_tensors(model: SparseModel) -> Iterator[torch.Tensor]:
    """Yields what must be the same on all ranks: the weights, and which are active."""
    yield from model.module.parameters()
    store = model.store
    if store is None:
        yield from model.masks.values()
    else:
        yield from (store.frozen_values, store.positions, store.frozen_positions)
        yield torch.tensor(list(model.counts.values()), device=store.positions.device)


def without_sync(module: nn.Module) -> AbstractContextManager[None]:
    """Lets gradients add up on each rank, until a backward pass outside averages their sum."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()


def _arrange_messages(replica: nn.Module, module: nn.Module, example: torch.Tensor) -> None:
    """Takes one backward pass, after which DDP arranges its messages by the order in which gradients come.

    The place of a value in a message decides the order in which three or more ranks add it. A run that resumes would
    otherwise take its first step with other places than a run without a stop.
    """
    with _nothing_kept(module, example):
        _total(replica(example)).backward()
        for parameter in module.parameters():
            parameter.grad = None


def _without_gradient(module: nn.Module, example: torch.Tensor) -> list[str]:
    """Returns the names of parameters that get no gradient in training, such as those of an unused head."""
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    with _nothing_kept(module, example):
        found = torch.autograd.grad(_total(module(example)), list(trained.values()), allow_unused=True)
    return [name for name, gradient in zip(trained, found, strict=True) if gradient is None]


def _total(outputs: object) -> torch.Tensor:
    """Returns the sum of all outputs that have a gradient."""
    tensors = [each for each in tree_leaves(outputs) if isinstance(each, torch.Tensor) and each.requires_grad]
    return torch.stack([tensor.float().sum() for tensor in tensors]).sum()


@contextmanager
def _nothing_kept(module: nn.Module, example: torch.Tensor) -> Iterator[None]:
    """Lets a network run in training mode, and leaves its buffers and torch's random numbers as they were."""
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    module.train()
    try:
        with torch.random.fork_rng(devices=[example.device] if example.device.type == "cuda" else []):
            yield
    finally:
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                buffer.copy_(buffers[name])
