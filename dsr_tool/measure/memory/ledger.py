"""What training and inference in PyTorch hold in memory, computed without computing anything.

The real module, optimizer and MaskKeeper run on fake tensors, which have shapes and no contents, while every storage
is followed from its making to its end. What kernels take besides is added by rule where it counts, which is in
convolutions on a CPU: oneDNN works on copies in a blocked layout.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn, optim
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy

from dsr_tool.errors import UsageError, first_line, unknown_name
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
"""As `dsr-tool train` makes them by default: sgd and rmsprop with momentum; `sgd-plain` has none."""

_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
_STEPS = 2  # from the second on there are gradients and optimizer state before the forward pass


@dataclass(frozen=True)
class Ledger:
    """Bytes held at the moment of the peak, by what they are, and what each kind takes in full.

    Attributes:
        held: bytes in full by kind: `weights`, `masks`, `optimizer state`, `gradients`, `saved activations`.
        at_peak: bytes by kind at the moment at which all together are most; kernels' scratch among them.
        moment: the operator that ran at that moment.
    """

    held: dict[str, int]
    at_peak: dict[str, int]
    moment: str

    @property
    def peak_bytes(self) -> int:
        """Everything at the moment at which it is most."""
        return sum(self.at_peak.values())


def make_optimizer(name: str, parameters: Iterable[nn.Parameter]) -> optim.Optimizer:
    """An optimizer by name.

    Raises:
        UsageError: nobody knows the name.
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
    """The memory of training a sparse model with a method attached, on the CPU, step after step.

    The order within a step is that of `dsr-tool train`: forward, gradients dropped, backward, optimizer.

    Args:
        model: stays as it is.
        batch: inputs of one step.
        input_shape: of one input; that of the model's description when empty.
        optimizer: one of `OPTIMIZERS`.
        precision: of forward and backward, `fp32` or `bf16`; weights stay as they are.

    Raises:
        UsageError: a parameter with a value that is not allowed, or an input that the model cannot take.
    """
    if precision not in _PRECISIONS:
        raise unknown_name("precision", precision, _PRECISIONS)
    if optimizer not in OPTIMIZERS:
        raise unknown_name("--optimizer", optimizer, OPTIMIZERS)
    with _explained(model, batch, input_shape) as shape:
        twin = _Twin(model)
        twin.module.train()
        saved = _saved_bytes(twin, shape, precision)
        watch = StorageWatch()
        twin.register(watch)
        attached = _attached(twin, optimizer, watch)
        for _ in range(_STEPS):
            _step(twin, attached, watch, shape, precision)
        held = dict.fromkeys(("weights", "masks", "optimizer state", "gradients"), 0)
        return Ledger({**held, **_lasting(watch), "saved activations": saved}, watch.at_peak, watch.moment)


def inference_ledger(model: SparseModel, batch: int, *, input_shape: Sequence[int] = ()) -> Ledger:
    """The memory of running the module in PyTorch on the CPU, in eval mode and without gradients.

    Raises:
        UsageError: an input that the model cannot take.
    """
    with _explained(model, batch, input_shape) as shape:
        twin = _Twin(model)
        twin.module.eval()
        watch = StorageWatch()
        twin.register(watch, masks=False)
        with twin.fake, watch, torch.no_grad():
            inputs = torch.empty(shape, dtype=twin.dtype)
            watch.add("input", [inputs])
            twin.module(inputs)
        return Ledger(_lasting(watch), watch.at_peak, watch.moment)


def optimizer_state_bytes(model: SparseModel, optimizer: str) -> int:
    """Bytes of all tensors in the optimizer's state after a step.

    Raises:
        UsageError: nobody knows the optimizer.
    """
    twin = _Twin(model)
    with twin.fake:
        for parameter in twin.module.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    made = make_optimizer(optimizer, twin.module.parameters())
    made.step()
    return sum(tensor.nbytes for tensor in _state(made))


def _lasting(watch: StorageWatch) -> dict[str, int]:
    return {kind: n for kind, n in watch.bytes_by_kind().items() if kind not in ("activations", "input")}


def _state(optimizer: optim.Optimizer) -> Iterator[torch.Tensor]:
    for values in optimizer.state.values():
        yield from (value for value in values.values() if isinstance(value, torch.Tensor))


class _Twin:
    """A copy of a sparse model whose tensors have no contents."""

    def __init__(self, model: SparseModel) -> None:
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        with self.fake:
            memo: dict[int, Any] = {id(p): nn.Parameter(_hollow(p), p.requires_grad) for p in model.module.parameters()}
            memo |= {id(b): _hollow(b) for b in model.module.buffers()}
            self.module = copy.deepcopy(model.module, memo)
            masks = {name: torch.empty(mask.shape, dtype=torch.bool) for name, mask in model.masks.items()}
        self.model = SparseModel(self.module, model.specs, masks, model.config)
        self.dtype = next((p.dtype for p in self.module.parameters() if p.is_floating_point()), torch.float32)

    def register(self, watch: StorageWatch, *, masks: bool = True) -> None:
        """Enter what is there before the first step."""
        watch.add("weights", [*self.module.parameters(), *self.module.buffers()])
        if masks:
            watch.add("masks", self.model.masks.values())


def _hollow(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype)


def _attached(twin: _Twin, name: str, watch: StorageWatch) -> optim.Optimizer:
    """The optimizer with a MaskKeeper, whose integer masks are entered as they appear."""
    optimizer = make_optimizer(name, twin.module.parameters())
    before = set(watch.live)
    with watch:
        MaskKeeper(twin.model, optimizer)
    watch.relabel(set(watch.live) - before, "masks")
    return optimizer


def _step(twin: _Twin, optimizer: optim.Optimizer, watch: StorageWatch, shape: Sequence[int], precision: str) -> None:
    with twin.fake, watch:
        inputs = torch.empty(tuple(shape), dtype=twin.dtype)
        watch.add("input", [inputs])
        loss = _loss(twin.module, inputs, precision)
        optimizer.zero_grad()
        loss.backward()
    watch.add("gradients", [p.grad for p in twin.module.parameters() if p.grad is not None])
    # Outside the fake mode, so that step counters are real numbers that the optimizer can read.
    with watch:
        optimizer.step()
    watch.add("optimizer state", _state(optimizer))


def _loss(module: nn.Module, inputs: torch.Tensor, precision: str) -> torch.Tensor:
    low = _PRECISIONS[precision]
    with torch.autocast("cpu", low) if low != torch.float32 else nullcontext():
        outputs = module(inputs)
        # Auxiliary outputs come behind the main one, or beside it by name.
        every = outputs.values() if isinstance(outputs, Mapping) else outputs
        losses = []
        for output in every if isinstance(every, Iterable) and not isinstance(every, torch.Tensor) else (every,):
            if output is not None:
                labels = torch.zeros((len(output), *output.shape[2:]), dtype=torch.int64)
                losses.append(cross_entropy(output.float(), labels))
        return torch.stack(losses).sum() if len(losses) > 1 else losses[0]


def _saved_bytes(twin: _Twin, shape: Sequence[int], precision: str) -> int:
    """Bytes that the forward pass keeps for the backward pass, without weights and buffers; shared ones once."""
    weights = {storage_key(tensor) for tensor in (*twin.module.parameters(), *twin.module.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> None:
        saved.setdefault(storage_key(tensor), tensor.untyped_storage())

    def unpack(_: None) -> torch.Tensor:
        raise UsageError("nothing is kept to go backward with.")

    with twin.fake, torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        loss = _loss(twin.module, torch.empty(tuple(shape), dtype=twin.dtype), precision)
    del loss
    return sum(storage.nbytes() for key, storage in saved.items() if key not in weights)


@contextmanager
def _explained(model: SparseModel, batch: int, input_shape: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """The shape of a batch; whatever the module raises on it becomes one sentence."""
    one = tuple(input_shape or model.config.input_shape)
    if not one:
        raise UsageError("the model's description has no input shape; convert it with one.")
    if batch < 1:
        raise UsageError(f"batch {batch} is not allowed; give 1 or more.")
    try:
        yield (batch, *one)
    except UsageError:
        raise
    except Exception as error:  # a module may raise anything
        raise UsageError(
            f"the memory of {type(model.module).__name__} for batch {batch} of input {list(one)} cannot be "
            f"computed: {first_line(error)}; give another batch or input size."
        ) from error
