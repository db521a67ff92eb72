"""TrainSettings: all settings of a training, checked together before it starts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch

from dsr_tool.errors import UsageError, unknown_name
from dsr_tool.methods import METHODS, Method, ReallocationSchedule, make, names
from dsr_tool.sparse.model import STORAGES
from dsr_tool.train.augment import AUGMENTATIONS
from exporters.values import GRID_BITS

__all__ = ["FINE_TUNING_RATES", "LEARNING_RATES", "MOMENTA", "PRECISIONS", "SCHEDULES", "TrainSettings"]

LEARNING_RATES = {"sgd": 0.1, "adam": 1e-3, "adamw": 1e-3, "rmsprop": 1e-3}
"""Default peak learning rate of each optimizer; its keys are the optimizers there are."""
FINE_TUNING_RATES = {"sgd": 0.003, "adam": 1e-4, "adamw": 1e-4, "rmsprop": 1e-4}
"""The same for a model that starts from trained weights."""
MOMENTA = {"sgd": 0.9, "rmsprop": 0.9}
"""Default momentum of each optimizer that has one."""
SCHEDULES = ("cosine", "step")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class TrainSettings:
    """All settings of a training; defaults are those of the paper's CIFAR-10 runs if it has them, cosine aside.

    A model that starts from trained weights has defaults of its own, which keep what they learned: a lower learning
    rate (`FINE_TUNING_RATES`), and methods that move less (`Method.fine_tuning`). What is given always wins.

    Attributes:
        method: name of a training method.
        epochs: passes over the training images.
        batch_size: images per optimizer step, of all processes together.
        accumulate: number of equal parts of a batch that are computed one after the other, to save memory; their
            gradients make one step. Batch normalisation uses the statistics of each part.
        lr: peak learning rate; None for the default of the optimizer.
        schedule: `cosine` to zero, or `step`, which multiplies by `gamma` at each milestone.
        milestones: epochs at which `step` lowers the rate; empty for 30, 60 and 80 % of the epochs, as in the paper.
        gamma: factor in (0, 1] at each milestone.
        warmup_epochs: number of epochs, or a fraction of one, in which the rate rises linearly to `lr`.
        optimizer: `sgd` (Nesterov when there is momentum), `adam`, `adamw` or `rmsprop`.
        momentum: momentum of `sgd` and `rmsprop`, the only ones with one; None for the default of the optimizer.
        weight_decay: factor of the L2 penalty on all parameters.
        l1: factor of the L1 penalty, the sum of the magnitudes of all weights of sparse layers; the optimizer takes its
            gradient together with that of the loss.
        label_smoothing: fraction of each label that is spread over all classes.
        class_weights: `none`, `balanced`, or the path of a file of weights: factors on the loss of a training image by
            its class, see `train.class_weights`.
        values: `fp32`, or a grid of few bits (`int8`, `int6`, `int5`, `int4`) that weights are rounded to in all passes
            and in the model that is saved; steps change exact weights behind them, see `train.rounding`.
        augment: name of an augmentation; None for the one that suits the data.
        device: `cpu`, `cuda`, or `auto` for CUDA if there is a GPU.
        precision: precision of forward and backward pass; weights and evaluation are always fp32.
        storage: how sparse weights are held while training: `masked`, `compact`, or `auto` for compact wherever the
            method, the device and the network allow it, see `train.storage`.
        channels_last: whether images lie channels last in memory in fp32 on a CPU, and with them all activations; None
            for yes. Elsewhere they always do.
        compile: whether to compile the model with `torch.compile`.
        workers: number of processes that load images; None for 0 if they are in memory, up to 4 if they are on disk.
        seed: seed of order, augmentation, dropout and random positions.
        every: optimizer steps between updates of the method at first; None for the method's default.
        stop: fraction of the training after which the masks stay; None for the method's default.
        doubling: epochs at which `every` doubles; empty for the method's default.
        options: options of the method by name.
        fine_tune: whether to take the defaults of a model that starts from trained weights; None for what the model's
            description says, see `starts_trained`.
        teacher: model folder, run folder or state_dict file of a network of the same architecture, whose outputs are
            learned from; None for none.
        teacher_weight: share of the loss that compares the outputs with the teacher's, in (0, 1].
        teacher_temperature: divisor of both scores there; see `distillation`.
    """

    method: str = "dsr"
    epochs: int = 30
    batch_size: int = 128
    accumulate: int = 1
    lr: float | None = None
    schedule: str = "cosine"
    milestones: tuple[float, ...] = ()
    gamma: float = 0.2
    warmup_epochs: float = 0.0
    optimizer: str = "sgd"
    momentum: float | None = None
    weight_decay: float = 5e-4
    l1: float = 0.0
    label_smoothing: float = 0.0
    class_weights: str = "none"
    values: str = "fp32"
    augment: str | None = None
    device: str = "auto"
    precision: str = "fp32"
    storage: str = "auto"
    channels_last: bool | None = None
    compile: bool = False
    workers: int | None = None
    seed: int = 0
    every: int | None = None
    stop: float | None = None
    doubling: tuple[float, ...] = ()
    options: Mapping[str, float | str] = field(default_factory=dict)
    fine_tune: bool | None = None
    teacher: str | None = None
    teacher_weight: float = 0.7
    teacher_temperature: float = 2.0

    def check(self) -> None:
        """Raises one `UsageError` that lists every value that is not allowed, each with what is allowed."""
        if errors := self.problems():
            raise UsageError(" ".join(errors))

    def problems(self) -> list[str]:
        """Returns a sentence for every value that is not allowed, named as an option of the command line."""
        return [*self._unknown_names(), *self._out_of_range(), *self._conflicts(), *self._method_problems()]

    def _unknown_names(self) -> Iterator[str]:
        for name, known in (
            ("method", names()),
            ("schedule", SCHEDULES),
            ("optimizer", LEARNING_RATES),
            ("augment", AUGMENTATIONS),
            ("device", _DEVICES),
            ("precision", PRECISIONS),
            ("storage", ("auto", *STORAGES)),
            ("values", ("fp32", *GRID_BITS)),
        ):
            value = getattr(self, name)
            if value is not None and value not in known:
                yield str(unknown_name(f"--{name}", str(value), known))

    def _out_of_range(self) -> Iterator[str]:
        # Bounds are inclusive; 1e-12 stands for "above 0", and 1 - 1e-9 for "below 1".
        for name, low, high, allowed in (
            ("epochs", 1, math.inf, "1 or more"),
            # Batch normalisation learns nothing from a single image.
            ("batch_size", 2, 2**31 - 1, "2 or more images, below 2^31"),
            ("accumulate", 1, math.inf, "1 or more parts of a batch"),
            ("lr", 1e-12, math.inf, "a positive number"),
            ("gamma", 1e-12, 1, "a factor in (0, 1]"),
            ("warmup_epochs", 0, math.inf, "0 or more epochs"),
            ("momentum", 0, 1 - 1e-9, "a fraction in [0, 1)"),
            ("weight_decay", 0, math.inf, "0 or more"),
            ("l1", 0, math.inf, "0 or more"),
            ("label_smoothing", 0, 1 - 1e-9, "a fraction in [0, 1)"),
            ("workers", 0, math.inf, "0 or more processes"),
            ("teacher_weight", 1e-12, 1, "a share of the loss in (0, 1]"),
            ("teacher_temperature", 1e-12, math.inf, "a positive number"),
            ("seed", 0, 2**63 - 1, "a whole number from 0 on"),
            ("every", 1, math.inf, "1 or more steps"),
            ("stop", 0, 1, "a fraction of the training in [0, 1]"),
        ):
            value = getattr(self, name)
            # Written so that NaN is refused too, which compares false with everything.
            if value is not None and not (low <= value <= high and math.isfinite(value)):
                yield f"--{name.replace('_', '-')} {value} is not allowed; give {allowed}."

    def _method_problems(self) -> Iterator[str]:
        if (
            self.method in names()
            and (self.stop is None or 0 <= self.stop <= 1)
            and (self.every is None or self.every > 0)
            and all(map(math.isfinite, self.doubling))
        ):
            try:
                # The length is not known before the data is; a schedule of 10^6 steps shows everything else.
                self.require_update(10**6)
            except UsageError as error:
                yield str(error)
            except TypeError:
                options = ", ".join(f"{name} {value!r}" for name, value in self.options.items())
                yield f"an option of method {self.method} has a value of the wrong type ({options}); give numbers."

    def _conflicts(self) -> Iterator[str]:
        for name in ("milestones", "doubling"):
            epochs = getattr(self, name)
            if not all(earlier < later for earlier, later in pairwise((0, *epochs, math.inf))):
                yield f"--{name} {list(epochs)} is not allowed; give epochs that rise from above 0."
            elif epochs and 1 <= self.epochs <= epochs[-1]:
                yield f"--{name} {list(epochs)} ends after the training; give epochs before the last of {self.epochs}."
        if self.accumulate > 1 and (self.batch_size % self.accumulate or self.batch_size < 2 * self.accumulate):
            yield (
                f"--accumulate {self.accumulate} does not divide --batch-size {self.batch_size} into equal parts of 2 "
                f"or more images; give a divisor of it, or another --batch-size."
            )
        if self.milestones and self.schedule == "cosine":
            yield "--milestones needs --schedule step; cosine has none."
        if self.momentum and self.optimizer in LEARNING_RATES.keys() - MOMENTA:
            known = " or ".join(MOMENTA)
            yield f"--momentum {self.momentum} needs --optimizer {known}; {self.optimizer} has none, so leave it out."
        if 1 <= self.epochs <= self.warmup_epochs:
            yield f"--warmup-epochs {self.warmup_epochs} is not allowed; give fewer than the {self.epochs} epochs."
        if self.device == "cuda" and not torch.cuda.is_available():
            yield "--device 'cuda' is not available: torch finds no GPU; give cpu or auto."
        if self.storage == "compact" and (reason := self.masked_because()):
            yield f"--storage compact is not possible: {reason}; give masked or auto."
        row = METHODS.get(self.method)
        if self.values in GRID_BITS and row is not None and row.computes_weights:
            yield (
                f"--values {self.values!r} does not go with --method {self.method}, which computes the weights of a "
                f"pass from others itself; give fp32, or another method."
            )
        if self.precision == "fp16" and self.torch_device.type == "cpu":
            yield "--precision 'fp16' needs a GPU; give bf16 or fp32 on a CPU."

    def masked_because(self) -> str:
        """Returns why these settings need masked storage whatever the network, or an empty text."""
        row = METHODS.get(self.method)
        if row is not None and "compact" not in row.storages:
            return f"method {self.method} needs all positions of a weight, active or not"
        return "torch.compile sees no weights in it" if self.compile else ""

    @property
    def torch_device(self) -> torch.device:
        """The device that `device` means on this machine."""
        name = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        # An unknown name is reported by problems(), which needs some device to check the rest.
        return torch.device(name if name in _DEVICES else "cpu")

    @property
    def memory_format(self) -> torch.memory_format:
        """Memory format of weights: channels last on a GPU and in bf16, where convolutions are faster so.

        In fp32 on a CPU they stay row-major, as fused optimizer steps need them.
        """
        last = self.torch_device.type == "cuda" or self.precision != "fp32"
        return torch.channels_last if last else torch.preserve_format

    @property
    def input_format(self) -> torch.memory_format:
        """Memory format of images, which the outputs of convolutions follow.

        In fp32 on a CPU, it made steps of seven networks .98 to 1.6 times as fast, in eleven cases on one AVX-512 core.
        """
        return self.memory_format if self.channels_last is False else torch.channels_last

    @property
    def learning_rate(self) -> float:
        """The peak learning rate."""
        rates = FINE_TUNING_RATES if self.fine_tune else LEARNING_RATES
        return self.lr if self.lr is not None else rates[self.optimizer]

    @property
    def resolved_momentum(self) -> float | None:
        """The momentum, or None for an optimizer that has none."""
        return self.momentum if self.momentum is not None else MOMENTA.get(self.optimizer)

    def make_method(self, total_steps: int) -> Method:
        """Returns the method for a training of `total_steps` optimizer steps."""
        # Methods count in fractions of the training. Zero epochs are refused elsewhere, and must not divide here.
        doubling = tuple(epoch / max(self.epochs, 1) for epoch in self.doubling)
        return make(self.method, total_steps, every=self.every, stop=self.stop, doubling=doubling, **self.options)

    def require_update(self, total_steps: int) -> None:
        """Raises `UsageError` if `every` is so long that the schedule ends before the method's first update."""
        schedule = getattr(self.make_method(total_steps), "schedule", None)
        asked = self.every is not None and self.stop != 0
        if asked and isinstance(schedule, ReallocationSchedule) and not schedule.last:
            raise UsageError(
                f"--every {self.every} leaves {self.method} no update before its schedule ends at step {schedule.stop} "
                f"of {total_steps}; lower it, raise --stop, or train longer."
            )

    def resolve(self, augment: str, *, trained: bool = False) -> TrainSettings:
        """Returns the settings with every None that stands for a default filled in, as they are logged.

        Args:
            augment: the augmentation that suits the data.
            trained: whether the model starts from trained weights.
        """
        chosen = replace(self, fine_tune=trained if self.fine_tune is None else self.fine_tune)
        chosen = replace(chosen, lr=chosen.learning_rate, momentum=self.resolved_momentum)
        if chosen.fine_tune and self.method in METHODS:  # a plugin method has its own defaults
            options = dict(METHODS[self.method].fine_tuning)
            stop = options.pop("stop", None)
            chosen = replace(
                chosen,
                stop=float(stop) if self.stop is None and stop is not None else self.stop,
                options={**options, **self.options},
            )
        return replace(
            chosen,
            augment=self.augment or augment,
            device=self.torch_device.type,
            channels_last=self.input_format == torch.channels_last,
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values for JSON."""
        lists = {name: list(getattr(self, name)) for name in ("milestones", "doubling")}
        return {**asdict(self), **lists, "options": dict(self.options)}
