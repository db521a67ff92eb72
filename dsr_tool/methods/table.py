"""The table of training methods. A row is a class, which tells its own name, options, schedule, memory and help."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dsr_tool.errors import UsageError, join_words, unknown_name
from dsr_tool.methods.base import Method
from dsr_tool.methods.deepr import DeepR
from dsr_tool.methods.dense import Dense
from dsr_tool.methods.dsr import DSR
from dsr_tool.methods.dst import DST
from dsr_tool.methods.gmp import GradualPruning
from dsr_tool.methods.granet import GraNet
from dsr_tool.methods.neuron_set import NeuronSET
from dsr_tool.methods.plugins import load_plugin, plugin_names
from dsr_tool.methods.rigl import RigL
from dsr_tool.methods.schedule import Timing
from dsr_tool.methods.set import SET
from dsr_tool.methods.snfs import SNFS
from dsr_tool.methods.static import Static
from dsr_tool.methods.tied import Tied

__all__ = ["METHODS", "make", "names", "option_names"]

METHODS: dict[str, type[Method]] = {
    row.name: row for row in (DSR, Static, Dense, SET, DeepR, RigL, SNFS, GradualPruning, GraNet, DST, Tied, NeuronSET)
}
"""The methods of this package by name, in the order of the help text. Plugin methods are not in it; see `names`."""


def make(
    name: str,
    total_steps: int,
    *,
    every: int | None = None,
    stop: float | None = None,
    doubling: Sequence[float] = (),
    **options: Any,
) -> Method:
    """Makes a method by name, with its paper's schedule scaled to the length of the training.

    Args:
        name: a name in `METHODS`, or the entry point of a plugin method.
        total_steps: number of optimizer steps of the whole training.
        every: steps between updates at first; None for the method's default.
        stop: fraction of the training after which nothing is pruned or grown; None for the method's default.
        doubling: fractions of the training at which `every` doubles; empty for the method's default.
        options: the method's own options.

    Raises:
        UsageError: the method or an option is unknown, or a value is not allowed.
    """
    timing: Timing = {"total_steps": total_steps, "every": every}
    # An absent key means the method's default, which differs between methods.
    if stop is not None:
        timing["stop"] = stop
    if doubling:
        timing["doubling"] = doubling
    # Own names first, so that a plugin cannot replace a method of this package.
    if name not in METHODS:
        if name not in (known := names()):
            raise unknown_name("method", name, known)
        return load_plugin(name, timing, options)
    row = METHODS[name]
    _require_own_options(row, options)
    return row.from_timing(timing, **options)


def names() -> list[str]:
    """Returns the names of all methods, plugin methods last."""
    return [*METHODS, *(name for name in plugin_names() if name not in METHODS)]


def option_names() -> list[str]:
    """Returns the names of the options of all methods in the table, sorted."""
    return sorted({option for row in METHODS.values() for option in row.option_defaults()})


def _require_own_options(row: type[Method], options: dict[str, Any]) -> None:
    own = [option.replace("_", "-") for option in row.option_defaults()]
    for option in options:
        if option in row.option_defaults():
            continue
        name = option.replace("_", "-")
        # An option of another method is no typing mistake, so the answer names its owners.
        owners = [other.name for other in METHODS.values() if option in other.option_defaults()]
        if owners:
            raise UsageError(f"option {name} goes with method {join_words(owners)}, not with {row.name}; leave it out.")
        allowed = f"the options of {row.name} are {', '.join(own)}" if own else f"{row.name} has no options"
        raise UsageError(f"option {name} is unknown to every method; {allowed}.")
