"""Training methods: each decides which weights to drop, how many each layer gets back, and where they grow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import optim

from dsr_tool.errors import UsageError, unknown_name
from dsr_tool.methods.attached import Attached
from dsr_tool.methods.base import Method, Reallocation
from dsr_tool.methods.dsr import DSR
from dsr_tool.methods.gmp import GradualPruning
from dsr_tool.methods.rigl import RigL
from dsr_tool.methods.schedule import ReallocationSchedule
from dsr_tool.methods.set import SET
from dsr_tool.methods.static import Static
from dsr_tool.sparse.model import SparseModel

__all__ = [
    "DSR",
    "METHODS",
    "OPTIONS",
    "SET",
    "Attached",
    "GradualPruning",
    "Method",
    "Reallocation",
    "ReallocationSchedule",
    "RigL",
    "Static",
    "attach",
    "make",
]

METHODS: dict[str, Callable[..., Method]] = {
    "dsr": lambda timing, **options: DSR(ReallocationSchedule.spread(**timing), **options),
    "static": lambda timing, **options: Static(**options),  # noqa: ARG005 - it has no schedule
    "set": lambda timing, **options: SET(ReallocationSchedule.spread(**timing), **options),
    "rigl": lambda timing, **options: RigL(ReallocationSchedule.steady(**timing), **options),
    "gmp": lambda timing, **options: GradualPruning(ReallocationSchedule.times(20, **timing), **options),
}
"""Each takes the arguments of its schedule, and the method's own options."""

OPTIONS: dict[str, tuple[str, ...]] = {
    "dsr": ("target", "tolerance", "threshold"),
    "static": (),
    "set": ("drop_fraction",),
    "rigl": ("drop_fraction",),
    "gmp": ("final_sparsity",),
}
"""Names of each method's own options."""


def make(name: str, total_steps: int, *, every: int | None = None, stop: float | None = None, **options: Any) -> Method:
    """Make a method by name, with its paper's schedule scaled to the length of the training.

    Args:
        name: one of `METHODS`.
        total_steps: optimizer steps of the whole training.
        every: steps between updates (at first); the method's own when absent.
        stop: fraction of the training after which nothing moves; the method's own when absent.
        options: the method's own.

    Raises:
        UsageError: nobody knows the method or an option of it, or a value is not allowed.
    """
    if name not in METHODS:
        raise unknown_name("method", name, METHODS)
    for option in options:
        if option not in OPTIONS[name]:
            takers = [method for method, names in OPTIONS.items() if option in names]
            goes = f"goes with method {' or '.join(takers)}" if takers else "is no option of any method"
            raise UsageError(f"option {option.replace('_', '-')} {goes}, not with {name}; leave it out.")
    timing = {"total_steps": total_steps, "every": every, **({} if stop is None else {"stop": stop})}
    return METHODS[name](timing, **options)


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
