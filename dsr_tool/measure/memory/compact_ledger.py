"""The memory of training in compact storage, computed without computing a single value.

The steps of the runner run on fake tensors with the kernels left out, so that whatever they save, lay out anew or free
is counted where it happens. Plans are made once, to learn their size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from dsr_tool.measure.memory.dry import CountedPlans, dry_kernels, program_of
from dsr_tool.measure.memory.hollow import HollowModel
from dsr_tool.measure.memory.steps import STEPS, Forward, Ledger, lasting, loss_of, make_optimizer, run_step
from dsr_tool.measure.memory.storages import StorageWatch
from dsr_tool.sparse.blocked.program import Program
from dsr_tool.sparse.compact.store import CompactStore

__all__ = ["compact_ledger"]


def compact_ledger(
    hollow: HollowModel, store: CompactStore, shape: Sequence[int], optimizer: str, precision: str
) -> Ledger:
    """Computes the memory of training steps of a compact model, on kernels if it can run on them.

    Args:
        hollow: the model on fake tensors, in training mode.
        store: its sparse weights.
        shape: shape of the input, the batch first.
        optimizer: one of `OPTIMIZERS`.
        precision: one of `PRECISIONS`.
    """
    plans = CountedPlans(store)
    with dry_kernels(plans):
        forward = _forward(hollow, store, plans, shape, precision)
        watch = StorageWatch()
        hollow.register(watch)
        stepped = make_optimizer(optimizer, hollow.module.parameters())
        saved = 0
        for _ in range(STEPS):
            saved = run_step(hollow, forward, stepped, watch, shape, precision)
    held = dict.fromkeys(("weights", "positions", "optimizer state", "gradients"), 0)
    held |= {**lasting(watch), "saved activations": saved, "plans": plans.bytes}
    # Plans exist from the first step on, outside of torch's memory.
    return Ledger(held, {**watch.at_peak, "plans": plans.bytes}, watch.moment)


def _forward(
    hollow: HollowModel, store: CompactStore, plans: CountedPlans, shape: Sequence[int], precision: str
) -> Forward:
    """Returns the forward pass on kernels, or the module itself, which rebuilds dense weights."""
    with hollow.fake:
        inputs = torch.empty(tuple(shape), dtype=hollow.dtype)
    program = program_of(hollow, store, plans, inputs) if precision == "fp32" else None
    if program is None:
        return hollow.module
    run = partial(_run, program, store)
    # The first pass notes where steps run, which is no part of a step.
    with hollow.fake, torch.no_grad():
        loss_of(run, inputs, precision)
    return run


def _run(program: Program, store: CompactStore, inputs: torch.Tensor) -> object:
    with store.forward():
        return program([inputs])
