"""Training methods: each decides which weights to drop, how many each layer gets back, and where they grow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import optim

from dsr_tool.errors import UsageError, unknown_name
from dsr_tool.methods.attached import Attached
from dsr_tool.methods.base import Method, Reallocation
from dsr_tool.methods.deepr import DeepR
from dsr_tool.methods.dense import Dense
from dsr_tool.methods.dsr import DSR
from dsr_tool.methods.dst import DST
from dsr_tool.methods.plugins import foreign_names, make_foreign
from dsr_tool.methods.gmp import GradualPruning
from dsr_tool.methods.neuron_set import NeuronSET
from dsr_tool.methods.rigl import RigL
from dsr_tool.methods.schedule import ReallocationSchedule
from dsr_tool.methods.set import SET
from dsr_tool.methods.static import Static
from dsr_tool.methods.tied import Tied
from dsr_tool.sparse.model import SparseModel

__all__ = [
    "DSR",
    "DST",
    "METHODS",
    "OPTIONS",
    "SET",
    "Attached",
    "DeepR",
    "Dense",
    "GradualPruning",
    "Method",
    "NeuronSET",
    "Reallocation",
    "ReallocationSchedule",
    "RigL",
    "Static",
    "Tied",
    "attach",
    "make",
    "names",
]

METHODS: dict[str, Callable[..., Method]] = {
    "dsr": lambda timing, **options: DSR(ReallocationSchedule.spread(**timing), **options),
    "static": lambda timing, **options: Static(**options),  # noqa: ARG005 - it has no schedule
    "dense": lambda timing, **options: Dense(**options),  # noqa: ARG005
    "set": lambda timing, **options: SET(ReallocationSchedule.spread(**timing), **options),
    "deepr": lambda timing, **options: DeepR(
        ReallocationSchedule.steady(**{"stop": 0.95, **timing, "every": timing["every"] or 1}),
        timing["total_steps"],
        **options,
    ),
    "rigl": lambda timing, **options: RigL(ReallocationSchedule.steady(**timing), **options),
    "gmp": lambda timing, **options: GradualPruning(ReallocationSchedule.times(20, **timing), **options),
    "dst": lambda timing, **options: DST(ReallocationSchedule.steady(**timing), **options),
    "tied": lambda timing, **options: Tied(**options),  # noqa: ARG005 - it has no schedule
    "neuron-set": lambda timing, **options: NeuronSET(
        ReallocationSchedule.spread(**timing),
        ReallocationSchedule.times(10, timing["total_steps"], stop=min(timing.get("stop", 0.5), 0.5)),
        **options,
    ),
}
"""Each takes the arguments of its schedule, and the method's own options."""

OPTIONS: dict[str, tuple[str, ...]] = {
    "dsr": ("target", "tolerance", "threshold", "cross_layer"),
    "static": (),
    "dense": (),
    "set": ("drop_fraction",),
    "deepr": ("eta", "l1", "temperature"),
    "rigl": ("drop_fraction",),
    "gmp": ("final_sparsity", "scope"),
    "dst": ("final_sparsity",),
    "tied": ("final_sparsity",),
    "neuron-set": ("drop_fraction", "unit_threshold"),
}
"""Names of each method's own options."""


def make(
    name: str,
    total_steps: int,
    *,
    every: int | None = None,
    stop: float | None = None,
    doubling: Sequence[float] = (),
    **options: Any,
) -> Method:
    """Make a method by name, with its paper's schedule scaled to the length of the training.

    Args:
        name: one of `METHODS`, or the entry point of another distribution's.
        total_steps: optimizer steps of the whole training.
        every: steps between updates (at first); the method's own when absent.
        stop: fraction of the training after which nothing moves; the method's own when absent.
        doubling: fractions of the training after which the steps between updates double; the method's own when absent.
        options: the method's own.

    Raises:
        UsageError: nobody knows the method or an option of it, or a value is not allowed.
    """
    timing: dict[str, Any] = {"total_steps": total_steps, "every": every}
    timing |= ({} if stop is None else {"stop": stop}) | ({"doubling": doubling} if doubling else {})
    if name not in METHODS:
        if name not in (known := names()):
            raise unknown_name("method", name, known)
        return make_foreign(name, timing, options)
    for option in options:
        if option not in OPTIONS[name]:
            takers = [method for method, own in OPTIONS.items() if option in own]
            list_of = " or ".join(filter(None, (", ".join(takers[:-1]), *takers[-1:])))
            goes = f"goes with method {list_of}" if takers else "is no option of any method"
            raise UsageError(f"option {option.replace('_', '-')} {goes}, not with {name}; leave it out.")
    return METHODS[name](timing, **options)


def names() -> list[str]:
    """Names of all methods there are, those of other distributions last."""
    return [*METHODS, *(name for name in foreign_names() if name not in METHODS)]


def attach(
    model: SparseModel,
    optimizer: optim.Optimizer,
    method: Method | str = "dsr",
    *,
    total_steps: int = 0,
    seed: int = 0,
    **options: Any,
) -> Attached:
    """Let a method work inside any training loop: after this, `optimizer.step()` is all it needs.

    Args:
        model: the sparse model, already on its device.
        optimizer: made from `model.module.parameters()`.
        method: a method, or the name of one.
        total_steps: optimizer steps of the whole training, over which a method by name spreads its reallocations;
            `static` has none.
        seed: of the random positions.
        options: as for `make`, where the method is a name: `final_sparsity=0.9` for `gmp`, say.

    Raises:
        UsageError: options for a method that is made already, or whatever `make` and the method refuse.
    """
    if isinstance(method, str):
        method = make(method, total_steps, **options)
    elif options:
        raise UsageError(f"option {next(iter(options))} comes too late for a method that is made; give it to make().")
    return Attached(model, optimizer, method, seed=seed)
