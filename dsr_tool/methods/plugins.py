"""Plugin methods: methods from other distributions, found by entry points of the group `dsr_tool.methods`.

An entry point names a `Method` subclass or any function that returns a method. It is called as
`maker(timing, **options)`; `timing` is a dict with `total_steps`, `every` (None for the method's default) and, if the
user set them, `stop` and `doubling`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points

import torch

from dsr_tool.errors import DsrError, UsageError, first_line
from dsr_tool.methods.base import Method
from dsr_tool.methods.schedule import Timing
from dsr_tool.sparsity.budget import Budget

__all__ = ["GROUP", "load_plugin", "plugin_error", "plugin_names", "reporting_plugin"]

GROUP = "dsr_tool.methods"
"""Entry-point group that plugin methods are declared in."""


def plugin_names() -> list[str]:
    """Returns the names of all installed plugin methods, sorted."""
    return sorted({point.name for point in entry_points(group=GROUP)})


def load_plugin(name: str, timing: Timing, options: Mapping[str, object]) -> Method:
    """Makes the plugin method of an entry point, and records the entry point in its attribute `plugin`.

    Args:
        name: name of the entry point.
        timing: the length of the training, and what the user set of the schedule.
        options: the plugin method's own options.

    Raises:
        UsageError: the plugin cannot be imported, refuses its options, or makes something that is not a `Method`.
    """
    point = next(point for point in entry_points(group=GROUP) if point.name == name)
    with reporting_plugin(point, "cannot be loaded"):
        maker = point.load()
    if not callable(maker):
        raise plugin_error(point, f"is of type {type(maker).__name__}, expected a Method class or a function")
    listed = " ".join(f"{option}={value}" for option, value in options.items()) or "no options"
    with reporting_plugin(point, f"cannot be made with {listed}"):
        method = maker(dict(timing), **options)
    if not isinstance(method, Method):
        raise plugin_error(point, f"makes {type(method).__name__}, expected a Method of dsr_tool.methods")
    _check_declaration(point, method)
    # object.__setattr__ also works for a plugin class that is a frozen dataclass.
    object.__setattr__(method, "plugin", point)
    return method


def _check_declaration(point: EntryPoint, method: Method) -> None:
    """Raises `UsageError` if a method declares a final sparsity that is none, or no step at which it is reached."""
    final = method.final_sparsity
    if final is None:
        return
    try:
        Budget.of_sparsity(str(final))
    except UsageError as error:
        raise plugin_error(
            point, f"declares a final_sparsity that cannot be ({error.args[0].partition(';')[0]})"
        ) from None
    if method.final_step < 1:
        raise plugin_error(
            point, f"declares final_sparsity {final} and final_step {method.final_step}, expected a step from 1 on"
        )


@contextmanager
def reporting_plugin(point: EntryPoint | None, problem: str) -> Iterator[None]:
    """Turns any exception of a plugin's code into one sentence that names the entry point and its distribution.

    Args:
        point: the plugin's entry point; with None, exceptions pass unchanged.
        problem: the failed step, for the sentence ("failed in update()").

    Raises:
        UsageError: the plugin's code raised; errors of dsr-tool and a GPU that runs out of memory pass unchanged.
    """
    try:
        yield
    except (DsrError, torch.OutOfMemoryError):
        raise
    # Anything: the code is a stranger's, and a traceback would point at dsr-tool.
    except Exception as error:
        if point is None:
            raise
        raise plugin_error(point, f"{problem} ({type(error).__name__}: {first_line(error)})") from error


def plugin_error(point: EntryPoint, problem: str) -> UsageError:
    """Returns the error for a plugin method that does not work."""
    source = f" of {point.dist.name}" if point.dist else ""
    return UsageError(
        f"method {point.name!r} (entry point {point.value}{source}) {problem}; fix the plugin, or give another method."
    )
