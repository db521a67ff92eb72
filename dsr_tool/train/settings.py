"""TrainSettings: everything a training is told, checked as a whole before it starts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch

from dsr_tool.errors import UsageError, unknown_name
from dsr_tool.methods import Method, ReallocationSchedule, make, names
from dsr_tool.train.augment import AUGMENTATIONS

__all__ = ["LEARNING_RATES", "MOMENTA", "PRECISIONS", "SCHEDULES", "TrainSettings"]

LEARNING_RATES = {"sgd": 0.1, "adam": 1e-3, "adamw": 1e-3, "rmsprop": 1e-3}
"""The optimizers there are, and the learning rate of each when none is given."""
MOMENTA = {"sgd": 0.9, "rmsprop": 0.9}
"""The optimizers that have a momentum, and that of each when none is given."""
SCHEDULES = ("cosine", "step")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class TrainSettings:
    """How to train; the defaults are those of the paper's CIFAR-10 runs where it has them, with a cosine schedule.

    Attributes:
        method: name of a training method.
        epochs: passes over the training images.
        batch_size: images per optimizer step.
        lr: peak learning rate; None for the usual one of the optimizer.
        schedule: `cosine` to zero, or `step` by `gamma` at each milestone.
        milestones: epochs at which `step` lowers the rate; none: at 30, 60 and 80 % as in the paper.
        gamma: factor of each of these.
        warmup_epochs: epochs of linear rise to `lr`; may be a fraction.
        optimizer: `sgd` (Nesterov when there is momentum), `adam`, `adamw` or `rmsprop`.
        momentum: of `sgd` and `rmsprop`, which the others have none of; None for the usual one.
        weight_decay: on all parameters.
        label_smoothing: fraction of each label spread over all classes.
        augment: name of an augmentation; None for the one that suits the data.
        device: `auto` takes CUDA where there is one.
        precision: of forward and backward; weights and evaluation stay fp32.
        compile: whether to run the model through `torch.compile`.
        workers: processes that load images; None for none in memory and a few on disk.
        seed: of order, augmentation, dropout and random positions.
        every: optimizer steps between updates of the method (at first); None for its own.
        stop: fraction of the training after which nothing moves; None for the method's own.
        doubling: epochs at which `every` doubles; none: the method's own.
        options: the method's own options by name.
    """

    method: str = "dsr"
    epochs: int = 30
    batch_size: int = 128
    lr: float | None = None
    schedule: str = "cosine"
    milestones: tuple[float, ...] = ()
    gamma: float = 0.2
    warmup_epochs: float = 0.0
    optimizer: str = "sgd"
    momentum: float | None = None
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    augment: str | None = None
    device: str = "auto"
    precision: str = "fp32"
    compile: bool = False
    workers: int | None = None
    seed: int = 0
    every: int | None = None
    stop: float | None = None
    doubling: tuple[float, ...] = ()
    options: Mapping[str, float | str] = field(default_factory=dict)

    def check(self) -> None:
        """Raise one `UsageError` that lists every value that is not allowed, each with what is."""
        if errors := self.problems():
            raise UsageError(" ".join(errors))

    def problems(self) -> list[str]:
        """A sentence for every value that is not allowed, which names it as an option of the command line."""
        return [*self._unknown(), *self._out_of_range(), *self._at_odds(), *self._method()]

    def _unknown(self) -> Iterator[str]:
        for name, known in (
            ("method", names()),
            ("schedule", SCHEDULES),
            ("optimizer", LEARNING_RATES),
            ("augment", AUGMENTATIONS),
            ("device", _DEVICES),
            ("precision", PRECISIONS),
        ):
            value = getattr(self, name)
            if value is not None and value not in known:
                yield str(unknown_name(f"--{name}", str(value), known))

    def _out_of_range(self) -> Iterator[str]:
        for name, low, high, allowed in (
            ("epochs", 1, math.inf, "1 or more"),
            # Batch normalisation learns nothing from a single image.
            ("batch_size", 2, math.inf, "2 or more images"),
            ("lr", 1e-12, math.inf, "a positive number"),
            ("gamma", 1e-12, 1, "a factor in (0, 1]"),
            ("warmup_epochs", 0, math.inf, "0 or more epochs"),
            ("momentum", 0, 1 - 1e-9, "a fraction in [0, 1)"),
            ("weight_decay", 0, math.inf, "0 or more"),
            ("label_smoothing", 0, 1 - 1e-9, "a fraction in [0, 1)"),
            ("workers", 0, math.inf, "0 or more processes"),
            ("seed", 0, 2**63 - 1, "a whole number from 0 on"),
            ("every", 1, math.inf, "1 or more steps"),
            ("stop", 0, 1, "a fraction of the training in [0, 1]"),
        ):
            value = getattr(self, name)
            # Written so that NaN is refused; infinity never is of use.
            if value is not None and not (low <= value <= high and math.isfinite(value)):
                yield f"--{name.replace('_', '-')} {value} is not allowed; give {allowed}."

    def _method(self) -> Iterator[str]:
        if (
            self.method in names()
            and (self.stop is None or 0 <= self.stop <= 1)
            and (self.every is None or self.every > 0)
            and all(map(math.isfinite, self.doubling))
        ):
            try:
                self.require_update(10**6)
            except UsageError as error:
                yield str(error)
            except TypeError:
                told = ", ".join(f"{name} {value!r}" for name, value in self.options.items())
                yield f"an option of {self.method} has a value of the wrong type ({told}); give numbers."

    def _at_odds(self) -> Iterator[str]:
        for name in ("milestones", "doubling"):
            epochs = getattr(self, name)
            if not all(earlier < later for earlier, later in pairwise((0, *epochs, math.inf))):
                yield f"--{name} {list(epochs)} is not allowed; give epochs that rise from above 0."
            elif epochs and 1 <= self.epochs <= epochs[-1]:
                yield f"--{name} {list(epochs)} ends after the training; give epochs before the last of {self.epochs}."
        if self.milestones and self.schedule == "cosine":
            yield "--milestones goes with --schedule step; cosine has none."
        if self.momentum and self.optimizer in LEARNING_RATES.keys() - MOMENTA:
            has = " or ".join(MOMENTA)
            yield f"--momentum {self.momentum} goes with --optimizer {has}; {self.optimizer} has none, so leave it out."
        if 1 <= self.epochs <= self.warmup_epochs:
            yield f"--warmup-epochs {self.warmup_epochs} is not allowed; give fewer than the {self.epochs} epochs."
        if self.device == "cuda" and not torch.cuda.is_available():
            yield "--device 'cuda' is not there: torch finds no GPU; give cpu, or auto."
        if self.precision == "fp16" and self.torch_device.type == "cpu":
            yield "--precision 'fp16' needs a GPU; give bf16 or fp32 on a CPU."

    @property
    def torch_device(self) -> torch.device:
        """The device that `device` means here."""
        name = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        return torch.device(name if name in _DEVICES else "cpu")

    @property
    def memory_format(self) -> torch.memory_format:
        """How images and weights lie: channels last where convolutions are faster for it, on a GPU and in bf16."""
        last = self.torch_device.type == "cuda" or self.precision != "fp32"
        return torch.channels_last if last else torch.preserve_format

    @property
    def learning_rate(self) -> float:
        """The peak learning rate."""
        return self.lr if self.lr is not None else LEARNING_RATES[self.optimizer]

    @property
    def inertia(self) -> float | None:
        """The momentum, for an optimizer that has one."""
        return self.momentum if self.momentum is not None else MOMENTA.get(self.optimizer)

    def make_method(self, total_steps: int) -> Method:
        """The method, for a training of so many optimizer steps."""
        doubling = tuple(epoch / max(self.epochs, 1) for epoch in self.doubling)
        return make(self.method, total_steps, every=self.every, stop=self.stop, doubling=doubling, **self.options)

    def require_update(self, total_steps: int) -> None:
        """Raise `UsageError` where `every` is so long that the schedule ends before the method's first update."""
        schedule = getattr(self.make_method(total_steps), "schedule", None)
        asked = self.every is not None and self.stop != 0
        if asked and isinstance(schedule, ReallocationSchedule) and not schedule.last:
            raise UsageError(
                f"--every {self.every} leaves {self.method} no update before its schedule ends at step {schedule.stop} "
                f"of {total_steps}; lower it, raise --stop, or train longer."
            )

    def resolve(self, augment: str) -> TrainSettings:
        """The same settings with every default that depends on something filled in, for the record.

        Args:
            augment: the augmentation that suits the data.
        """
        rates = replace(self, lr=self.learning_rate, momentum=self.inertia)
        return replace(rates, augment=self.augment or augment, device=self.torch_device.type)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        lists = {name: list(getattr(self, name)) for name in ("milestones", "doubling")}
        return {**asdict(self), **lists, "options": dict(self.options)}
