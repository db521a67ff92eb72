"""The memory of training and inference in PyTorch, computed without computing a single value.

The real module, optimizer and MaskKeeper run on fake tensors, which have shapes but no contents, while the lifetime of
every storage is tracked. Scratch of kernels is added by rule where it matters, which is in convolutions on a CPU:
oneDNN works on copies in a blocked layout.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import optim

from dsr_tool.errors import unknown_name
from dsr_tool.measure.memory.compact_ledger import compact_ledger
from dsr_tool.measure.memory.hollow import HollowModel
from dsr_tool.measure.memory.steps import (
    OPTIMIZERS,
    PRECISIONS,
    STEPS,
    Ledger,
    batch_shape,
    lasting,
    loss_of,
    make_optimizer,
    run_step,
    state_of,
)
from dsr_tool.measure.memory.storages import StorageWatch, storage_key
from dsr_tool.sparse.mask_keeper import MaskKeeper
from dsr_tool.sparse.model import SparseModel

__all__ = ["OPTIMIZERS", "Ledger", "inference_ledger", "make_optimizer", "optimizer_state_bytes", "training_ledger"]


def training_ledger(
    model: SparseModel,
    batch: int,
    *,
    input_shape: Sequence[int] = (),
    optimizer: str = "sgd",
    precision: str = "fp32",
) -> Ledger:
    """Computes the memory of training a sparse model with a method attached, on the CPU, step after step.

    A step runs in the order of `dsr-tool train`: forward pass, old gradients freed, backward pass, optimizer.

    Args:
        model: the model, in the storage that it will be trained in; it does not change.
        batch: inputs of one step.
        input_shape: shape of one input; if empty, the one in the model's description.
        optimizer: one of `OPTIMIZERS`.
        precision: type of forward and backward pass, `fp32` or `bf16`; weights keep their type.

    Raises:
        UsageError: a parameter has a value that is not allowed, or the model does not accept the input.
    """
    if precision not in PRECISIONS:
        raise unknown_name("precision", precision, PRECISIONS)
    if optimizer not in OPTIMIZERS:
        raise unknown_name("--optimizer", optimizer, OPTIMIZERS)
    with batch_shape(model, batch, input_shape) as shape:
        hollow = HollowModel(model)
        hollow.module.train()
        if hollow.store is not None:
            return compact_ledger(hollow, hollow.store, shape, optimizer, precision)
        # Before the watch starts: its own forward pass must not count as one of the steps.
        saved = _saved_bytes(hollow, shape, precision)
        watch = StorageWatch()
        hollow.register(watch)
        attached = _attached(hollow, optimizer, watch)
        for _ in range(STEPS):
            run_step(hollow, hollow.module, attached, watch, shape, precision)
        held = dict.fromkeys(("weights", "masks", "optimizer state", "gradients"), 0)
        return Ledger({**held, **lasting(watch), "saved activations": saved}, watch.at_peak, watch.moment)


def inference_ledger(model: SparseModel, batch: int, *, input_shape: Sequence[int] = ()) -> Ledger:
    """Computes the memory of running the module in PyTorch on the CPU, in eval mode and without gradients.

    Args:
        model: the model; it does not change.
        batch: inputs at once.
        input_shape: shape of one input; if empty, the one in the model's description.

    Raises:
        UsageError: the model does not accept the input.
    """
    with batch_shape(model, batch, input_shape) as shape:
        hollow = HollowModel(model)
        hollow.module.eval()
        watch = StorageWatch()
        hollow.register(watch, masks=False)
        with hollow.fake, watch, torch.no_grad():
            inputs = torch.empty(shape, dtype=hollow.dtype)
            watch.add("input", [inputs])
            hollow.module(inputs)
        return Ledger(lasting(watch), watch.at_peak, watch.moment)


def optimizer_state_bytes(model: SparseModel, optimizer: str) -> int:
    """Returns the bytes of all tensors in the optimizer's state after a step.

    Raises:
        UsageError: the optimizer is unknown.
    """
    hollow = HollowModel(model)
    # State is made in the first step, and only for parameters with a gradient.
    with hollow.fake:
        for parameter in hollow.module.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    stepped = make_optimizer(optimizer, hollow.module.parameters())
    stepped.step()
    return sum(tensor.nbytes for tensor in state_of(stepped))


def _attached(hollow: HollowModel, name: str, watch: StorageWatch) -> optim.Optimizer:
    """Makes the optimizer and attaches a MaskKeeper, whose integer masks count as masks."""
    optimizer = make_optimizer(name, hollow.module.parameters())
    # The keeper makes its masks inside of its constructor, so they are what is new afterwards.
    before = set(watch.live)
    with watch:
        MaskKeeper(hollow.model, optimizer)
    watch.relabel(set(watch.live) - before, "masks")
    return optimizer


def _saved_bytes(hollow: HollowModel, shape: Sequence[int], precision: str) -> int:
    """Returns the bytes that the forward pass saves for the backward pass, each storage once, without weights."""
    weights = {storage_key(tensor) for tensor in (*hollow.module.parameters(), *hollow.module.buffers())}
    # Holds the storages themselves: a freed one's key may be used again, and two would count as one.
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> None:
        saved.setdefault(storage_key(tensor), tensor.untyped_storage())

    def unpack(_: None) -> torch.Tensor:
        raise AssertionError("no backward pass runs here")

    with hollow.fake, torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        loss = loss_of(hollow.module, torch.empty(tuple(shape), dtype=hollow.dtype), precision)
    del loss
    return sum(storage.nbytes() for key, storage in saved.items() if key not in weights)
