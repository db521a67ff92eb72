"""Training methods: each decides which weights to drop, how many each layer gets back, and where they grow."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import optim

from dsr_tool.errors import unknown_name
from dsr_tool.methods.attached import Attached
from dsr_tool.methods.base import Method, Reallocation
from dsr_tool.methods.dsr import DSR
from dsr_tool.methods.schedule import ReallocationSchedule
from dsr_tool.methods.static import Static
from dsr_tool.sparse.model import SparseModel

__all__ = ["DSR", "METHODS", "Attached", "Method", "Reallocation", "ReallocationSchedule", "Static", "attach", "make"]

METHODS: dict[str, Callable[..., Method]] = {
    "dsr": lambda schedule, **options: DSR(schedule(), **options),
    "static": lambda _schedule, **options: Static(**options),
}
"""Each takes a function that makes the schedule, which `static` never calls, and the method's own options."""


def make(name: str, total_steps: int, *, every: int | None = None, stop: float = 0.95, **options: Any) -> Method:
    """Make a method by name, with the paper's schedule scaled to the length of the training.

    Args:
        name: one of `METHODS`.
        total_steps: optimizer steps of the whole training.
        every: steps between reallocations at first.
        stop: fraction of the training after which nothing moves.
        options: the method's own.

    Raises:
        UsageError: nobody knows the method, or a value is not allowed.
    """
    if name not in METHODS:
        raise unknown_name("method", name, METHODS)
    return METHODS[name](partial(ReallocationSchedule.spread, total_steps, every=every, stop=stop), **options)


def attach(
    model: SparseModel, optimizer: optim.Optimizer, method: Method | str = "dsr", *, total_steps: int = 0, seed: int = 0
) -> Attached:
    """Let a method work inside any training loop: after this, `optimizer.step()` is all it needs.

    Args:
        model: the sparse model, already on its device.
        optimizer: made from `model.module.parameters()`.
        method: a method, or the name of one.
        total_steps: optimizer steps of the whole training, over which a method by name spreads its reallocations;
            `static` has none.
        seed: of the random positions.
    """
    if isinstance(method, str):
        method = make(method, total_steps)
    return Attached(model, optimizer, method, seed=seed)
