"""Ledgers of both storages share these parts: optimizers, one training step under a watch, and its figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn, optim
from torch.nn.functional import cross_entropy

from dsr_tool.errors import UsageError, first_line, unknown_name
from dsr_tool.measure.memory.hollow import HollowModel
from dsr_tool.measure.memory.storages import StorageWatch
from dsr_tool.sparse.model import SparseModel

__all__ = [
    "OPTIMIZERS",
    "PRECISIONS",
    "STEPS",
    "Forward",
    "Ledger",
    "batch_shape",
    "lasting",
    "loss_of",
    "make_optimizer",
    "run_step",
    "state_of",
]

Forward = Callable[[torch.Tensor], Any]
"""A network's forward pass, from its inputs to its outputs."""

OPTIMIZERS: dict[str, Callable[..., optim.Optimizer]] = {
    "sgd": lambda parameters: optim.SGD(parameters, 1e-3, momentum=0.9, nesterov=True),
    "sgd-plain": lambda parameters: optim.SGD(parameters, 1e-3),
    "adam": lambda parameters: optim.Adam(parameters, 1e-3),
    "adamw": lambda parameters: optim.AdamW(parameters, 1e-3),
    "rmsprop": lambda parameters: optim.RMSprop(parameters, 1e-3, momentum=0.9),
}
"""The optimizers of a training step, with the defaults of `dsr-tool train`: sgd and rmsprop with momentum 0.9;
`sgd-plain` has none. The learning rate does not change the memory."""

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}

STEPS = 2
"""Training steps that are tracked: from the second on, gradients and optimizer state exist before the forward pass."""


@dataclass(frozen=True)
class Ledger:
    """Bytes by kind: in full, and at the moment when their sum is largest.

    Attributes:
        held: bytes in full by kind: `weights`, `masks` or `positions` and `plans`, `optimizer state`, `gradients`,
            `saved activations`.
        at_peak: bytes by kind at the moment of the peak; `scratch` of kernels is one of them.
        moment: name of the operator that runs at that moment, such as `aten.convolution`.
    """

    held: dict[str, int]
    at_peak: dict[str, int]
    moment: str

    @property
    def peak_bytes(self) -> int:
        """Bytes of all kinds together at the moment of the peak."""
        return sum(self.at_peak.values())


def make_optimizer(name: str, parameters: Iterable[nn.Parameter]) -> optim.Optimizer:
    """Makes an optimizer by its name in `OPTIMIZERS`.

    Raises:
        UsageError: the name is unknown.
    """
    if name not in OPTIMIZERS:
        raise unknown_name("--optimizer", name, OPTIMIZERS)
    return OPTIMIZERS[name](parameters)


def lasting(watch: StorageWatch) -> dict[str, int]:
    """Returns the bytes of the kinds that are still alive after a step."""
    return {kind: n for kind, n in watch.bytes_by_kind().items() if kind not in ("activations", "input")}


def state_of(optimizer: optim.Optimizer) -> Iterator[torch.Tensor]:
    """Yields the tensors in the state of an optimizer."""
    for values in optimizer.state.values():
        yield from (value for value in values.values() if isinstance(value, torch.Tensor))


def run_step(
    hollow: HollowModel,
    forward: Forward,
    optimizer: optim.Optimizer,
    watch: StorageWatch,
    shape: Sequence[int],
    precision: str,
) -> int:
    """Runs one training step under the watch. Returns the bytes of activations alive before the backward pass."""
    with hollow.fake, watch:
        inputs = torch.empty(tuple(shape), dtype=hollow.dtype)
        watch.add("input", [inputs])
        loss = loss_of(forward, inputs, precision)
        kinds = watch.bytes_by_kind()
        optimizer.zero_grad()
        loss.backward()
    watch.add("gradients", [p.grad for p in hollow.module.parameters() if p.grad is not None])
    # Outside the fake mode, so that step counters are real numbers: the optimizer computes with them.
    with watch:
        optimizer.step()
    watch.add("optimizer state", state_of(optimizer))
    return kinds["activations"] + kinds["input"]


def loss_of(forward: Forward, inputs: torch.Tensor, precision: str) -> torch.Tensor:
    """Returns the sum of the cross entropies of all outputs."""
    low = PRECISIONS[precision]
    with torch.autocast("cpu", low) if low != torch.float32 else nullcontext():
        outputs = forward(inputs)
        # Auxiliary heads return a tuple (GoogLeNet, Inception) or a dict (segmentation models).
        every = outputs.values() if isinstance(outputs, Mapping) else outputs
        losses = []
        for output in every if isinstance(every, Iterable) and not isinstance(every, torch.Tensor) else (every,):
            if output is not None:
                labels = torch.zeros((len(output), *output.shape[2:]), dtype=torch.int64)
                losses.append(cross_entropy(output.float(), labels))
        return torch.stack(losses).sum() if len(losses) > 1 else losses[0]


@contextmanager
def batch_shape(model: SparseModel, batch: int, input_shape: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Gives the shape of a batch; whatever the module raises on it becomes one sentence."""
    one = tuple(input_shape or model.config.input_shape)
    if not one:
        raise UsageError("the model's description has no input shape; convert the model with one.")
    if batch < 1:
        raise UsageError(f"batch {batch} is not 1 or more; give the number of inputs at once.")
    try:
        yield (batch, *one)
    except UsageError:
        raise
    except Exception as error:  # the module is the user's code, which may raise anything
        raise UsageError(
            f"the memory of {type(model.module).__name__} for a batch of {batch} inputs {list(one)} cannot be "
            f"computed: {first_line(error)}; give another batch or input size."
        ) from error
