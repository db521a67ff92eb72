"""The memory of training and inference in PyTorch, computed without computing a single value.

The real module, optimizer and MaskKeeper run on fake tensors, which have shapes but no contents, while the lifetime of
every storage is tracked. Scratch of kernels is added by rule where it matters, which is in convolutions on a CPU:
oneDNN works on copies in a blocked layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn, optim
from torch.nn.functional import cross_entropy

from dsr_tool.errors import UsageError, first_line, unknown_name
from dsr_tool.measure.memory.hollow import HollowModel
from dsr_tool.measure.memory.storages import StorageWatch, storage_key
from dsr_tool.sparse.keeper import MaskKeeper
from dsr_tool.sparse.model import SparseModel

__all__ = ["OPTIMIZERS", "Ledger", "inference_ledger", "make_optimizer", "optimizer_state_bytes", "training_ledger"]

OPTIMIZERS: dict[str, Callable[..., optim.Optimizer]] = {
    "sgd": lambda parameters: optim.SGD(parameters, 1e-3, momentum=0.9, nesterov=True),
    "sgd-plain": lambda parameters: optim.SGD(parameters, 1e-3),
    "adam": lambda parameters: optim.Adam(parameters, 1e-3),
    "adamw": lambda parameters: optim.AdamW(parameters, 1e-3),
    "rmsprop": lambda parameters: optim.RMSprop(parameters, 1e-3, momentum=0.9),
}
"""The optimizers of a training step, with the defaults of `dsr-tool train`: sgd and rmsprop with momentum 0.9;
`sgd-plain` has none. The learning rate does not change the memory."""

_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}

_STEPS = 2
"""Training steps that are tracked: from the second on, gradients and optimizer state exist before the forward pass."""


@dataclass(frozen=True)
class Ledger:
    """Bytes by kind: in full, and at the moment when their sum is largest.

    Attributes:
        held: bytes in full by kind: `weights`, `masks`, `optimizer state`, `gradients`, `saved activations`.
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
        model: the model; it does not change.
        batch: inputs of one step.
        input_shape: shape of one input; if empty, the one in the model's description.
        optimizer: one of `OPTIMIZERS`.
        precision: type of forward and backward pass, `fp32` or `bf16`; weights keep their type.

    Raises:
        UsageError: a parameter has a value that is not allowed, or the model does not accept the input.
    """
    if precision not in _PRECISIONS:
        raise unknown_name("precision", precision, _PRECISIONS)
    if optimizer not in OPTIMIZERS:
        raise unknown_name("--optimizer", optimizer, OPTIMIZERS)
    with _batch_shape(model, batch, input_shape) as shape:
        hollow = HollowModel(model)
        hollow.module.train()
        # Before the watch starts: its own forward pass must not count as one of the steps.
        saved = _saved_bytes(hollow, shape, precision)
        watch = StorageWatch()
        hollow.register(watch)
        attached = _attached(hollow, optimizer, watch)
        for _ in range(_STEPS):
            _step(hollow, attached, watch, shape, precision)
        held = dict.fromkeys(("weights", "masks", "optimizer state", "gradients"), 0)
        return Ledger({**held, **_lasting(watch), "saved activations": saved}, watch.at_peak, watch.moment)


def inference_ledger(model: SparseModel, batch: int, *, input_shape: Sequence[int] = ()) -> Ledger:
    """Computes the memory of running the module in PyTorch on the CPU, in eval mode and without gradients.

    Args:
        model: the model; it does not change.
        batch: inputs at once.
        input_shape: shape of one input; if empty, the one in the model's description.

    Raises:
        UsageError: the model does not accept the input.
    """
    with _batch_shape(model, batch, input_shape) as shape:
        hollow = HollowModel(model)
        hollow.module.eval()
        watch = StorageWatch()
        hollow.register(watch, masks=False)
        with hollow.fake, watch, torch.no_grad():
            inputs = torch.empty(shape, dtype=hollow.dtype)
            watch.add("input", [inputs])
            hollow.module(inputs)
        return Ledger(_lasting(watch), watch.at_peak, watch.moment)


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
    return sum(tensor.nbytes for tensor in _state(stepped))


def _lasting(watch: StorageWatch) -> dict[str, int]:
    """Returns the bytes of the kinds that are still alive after a step."""
    return {kind: n for kind, n in watch.bytes_by_kind().items() if kind not in ("activations", "input")}


def _state(optimizer: optim.Optimizer) -> Iterator[torch.Tensor]:
    for values in optimizer.state.values():
        yield from (value for value in values.values() if isinstance(value, torch.Tensor))


def _attached(hollow: HollowModel, name: str, watch: StorageWatch) -> optim.Optimizer:
    """Makes the optimizer and attaches a MaskKeeper, whose integer masks count as masks."""
    optimizer = make_optimizer(name, hollow.module.parameters())
    # The keeper makes its masks inside of its constructor, so they are what is new afterwards.
    before = set(watch.live)
    with watch:
        MaskKeeper(hollow.model, optimizer)
    watch.relabel(set(watch.live) - before, "masks")
    return optimizer


def _step(
    hollow: HollowModel, optimizer: optim.Optimizer, watch: StorageWatch, shape: Sequence[int], precision: str
) -> None:
    """Runs one training step under the watch."""
    with hollow.fake, watch:
        inputs = torch.empty(tuple(shape), dtype=hollow.dtype)
        watch.add("input", [inputs])
        loss = _loss(hollow.module, inputs, precision)
        optimizer.zero_grad()
        loss.backward()
    watch.add("gradients", [p.grad for p in hollow.module.parameters() if p.grad is not None])
    # Outside the fake mode, so that step counters are real numbers: the optimizer computes with them.
    with watch:
        optimizer.step()
    watch.add("optimizer state", _state(optimizer))


def _loss(module: nn.Module, inputs: torch.Tensor, precision: str) -> torch.Tensor:
    """Returns the sum of the cross entropies of all outputs."""
    low = _PRECISIONS[precision]
    with torch.autocast("cpu", low) if low != torch.float32 else nullcontext():
        outputs = module(inputs)
        # Auxiliary heads return a tuple (GoogLeNet, Inception) or a dict (segmentation models).
        every = outputs.values() if isinstance(outputs, Mapping) else outputs
        losses = []
        for output in every if isinstance(every, Iterable) and not isinstance(every, torch.Tensor) else (every,):
            if output is not None:
                labels = torch.zeros((len(output), *output.shape[2:]), dtype=torch.int64)
                losses.append(cross_entropy(output.float(), labels))
        return torch.stack(losses).sum() if len(losses) > 1 else losses[0]


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
        loss = _loss(hollow.module, torch.empty(tuple(shape), dtype=hollow.dtype), precision)
    del loss
    return sum(storage.nbytes() for key, storage in saved.items() if key not in weights)


@contextmanager
def _batch_shape(model: SparseModel, batch: int, input_shape: Sequence[int]) -> Iterator[tuple[int, ...]]:
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
